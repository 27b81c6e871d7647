# What editors and type checkers see of the names that __init__.py imports on first use. A test compares the two.

from deqjax.core.check import check_gradients as check_gradients
from deqjax.core.correction import fixed_point_correction as fixed_point_correction
from deqjax.core.fixed_point import Solution as Solution
from deqjax.core.fixed_point import fixed_point as fixed_point
from deqjax.core.gradients import OneStep as OneStep
from deqjax.core.gradients import Phantom as Phantom
from deqjax.core.gradients import Unrolled as Unrolled
from deqjax.core.gradients import adjoint_probe as adjoint_probe
from deqjax.core.implicit import Implicit as Implicit
from deqjax.core.implicit import Neumann as Neumann
from deqjax.core.reversible import Reversible as Reversible
from deqjax.core.solve import solve as solve
from deqjax.core.solvers import Anderson as Anderson
from deqjax.core.solvers import Broyden as Broyden
from deqjax.core.solvers import NewtonKrylov as NewtonKrylov
from deqjax.core.solvers import Picard as Picard
from deqjax.core.solvers import Solver as Solver
from deqjax.core.solvers import TriangularAnderson as TriangularAnderson
from deqjax.core.solvers import get_solver as get_solver
from deqjax.core.solvers import register_solver as register_solver
from deqjax.core.solvers.krylov import GMRES as GMRES
from deqjax.core.solvers.krylov import BiCGSTAB as BiCGSTAB
from deqjax.core.solvers.krylov import NormalCG as NormalCG
from deqjax.core.solvers.shine import SHINE as SHINE
from deqjax.core.stability import jacobian_loss as jacobian_loss
from deqjax.core.stability import spectral_radius as spectral_radius
from deqjax.core.stats import SolverStats as SolverStats
from deqjax.core.stats import Status as Status
from deqjax.nn.config import DEQConfig as DEQConfig
from deqjax.nn.deq import DEQ as DEQ

__version__: str
