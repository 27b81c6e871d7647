"""What checks the annotations of the package in every test: beartype, taking an int where a float is asked for."""

import collections.abc

import ml_collections
from beartype import BeartypeConf, beartype

# It is one in all but name.
collections.abc.Mapping.register(ml_collections.ConfigDict)

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
