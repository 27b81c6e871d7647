"""The command line of every experiment.

    python -m experiments.<task> --config configs/<name>.py[:variant] [--config.key=value ...] [--workdir DIR] [--mode ...]

A user's mistake ends in one paragraph on stderr and exit status 2, never in a traceback.
"""

import ast
import functools
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

try:
    from absl import flags
    from ml_collections import config_dict, config_flags
except ImportError as error:
    raise ImportError('experiments need absl and ml_collections: pip install "deqjax[train]"') from error

from deqjax.core.naming import did_you_mean
from deqjax.data.errors import DataError
from deqjax.training.errors import UserError
from deqjax.training.settings import Settings
from deqjax.training.task import Task

MODES = ("train", "eval")


def run(make_task: Callable[..., Task], argv: list[str] | None = None, default_workdir: str = "runs") -> int:
    """Runs an experiment.

    Mode "train" trains and resumes. "eval" calls the task's `report(model)`, or else prints `evaluate` of both splits.
    Any other mode that the task lists in `modes` calls the method of that name with the trained model, or without one if the
    task lists it in `without_model`, and prints what it returns.

    Args:
      make_task: a task from a config; its attribute `modes` lists the modes.
      argv: the command line, program name first; default that of the process.
      default_workdir: where runs go, each in a folder with its config's name, unless there is `--workdir`.

    Returns:
      The exit status.
    """
    argv = list(sys.argv if argv is None else argv)
    try:
        options = parse(argv, getattr(make_task, "modes", MODES), default_workdir)
        # Everything that starts JAX or Orbax comes after the cheap checks.
        from deqjax.training.compilation import kept_in
        from deqjax.training.processes import connect

        given = options.coordinator, options.num_processes, options.process_id
        if options.distributed or given != (None, None, None) or os.environ.get("JAX_COORDINATOR_ADDRESS"):
            connect(*given)
        with kept_in(options.workdir):
            _run_mode(make_task, options)
    except (UserError, DataError) as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename or options.workdir}.")
    except ImportError as error:
        # Whoever needs a package that is not there says how to install it; any other is a fault of ours.
        if "pip install" not in str(error):
            raise
        return _complain(str(error))
    return 0


def _run_mode(make_task, options) -> None:
    config, workdir = options.config, Path(options.workdir)
    try:
        task = make_task(config)
    except DataError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        # A task checks its settings while it is built, so what fails here is a setting.
        missing = "the config lacks a key or has a wrong value: " if not isinstance(error, ValueError) else ""
        raise UserError(f"{options.config_path}: {missing}{_message(error)}") from error
    from deqjax.training.console import say
    from deqjax.training.loop import evaluate, train
    from deqjax.training.start import trained_model

    if options.mode == "train":
        train(task, config, workdir, allow_changes=options.allow_changes, profile_steps=options.profile_steps)
        return
    if options.mode == "eval" and not hasattr(task, "report"):
        evaluate(task, config, workdir)
        return
    method = getattr(task, "report" if options.mode == "eval" else options.mode)
    needs_model = options.mode not in getattr(task, "without_model", ())
    result = method(trained_model(task, config, workdir)) if needs_model else method()
    if result is not None:
        say(result)


def parse(argv: list[str], modes=MODES, default_workdir: str = "runs") -> flags.FlagValues:
    """The command line: config (with the loop's settings), config_path, workdir, mode and the flags below.

    Raises:
      UserError: it is wrong.
    """
    values = flags.FlagValues()
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    switch = functools.partial(flags.DEFINE_bool, flag_values=values)
    number = functools.partial(flags.DEFINE_integer, flag_values=values, lower_bound=0)
    text("workdir", None, f"Directory of the run [{default_workdir}/<config name>].")
    flags.DEFINE_enum("mode", "train", list(modes), "What to do.", flag_values=values)
    switch("allow_changes", False, "Go on with a checkpoint although the config is another now.")
    number("profile_steps", 0, "Trace so many training steps to WORKDIR/profile.")
    switch("distributed", False, "One of several processes, which JAX finds (SLURM, Kubernetes, Cloud TPU).")
    text("coordinator", None, "HOST:PORT of the first of several processes.")
    number("num_processes", None, "How many processes there are.")
    number("process_id", None, "Which of them this is, from 0.")
    switch("help", False, "Show this and stop.", short_name="h")
    if any(arg in ("--help", "-h", "-help") for arg in argv[1:]):
        print(f"usage: {argv[0]} --config FILE [--config.key=value ...] [options]\n{values.get_help()}")
        raise SystemExit(0)
    usage = (
        f"usage: python -m experiments.<task> --config FILE.py[:variant] [--config.key=value ...] [--mode {'|'.join(modes)}]"
    )
    path, remaining = _take_config(argv)
    if path is None:
        raise UserError(f"--config is missing. {usage}")
    name, _, variant = path.partition(":")
    if not Path(name).is_file():
        raise UserError(f"--config={path}: there is no such file.{_available(path)}")
    if Path(name).suffix != ".py":
        raise UserError(f"--config={path}: a config is a Python file with a function get_config, and ends in .py.")
    config = load_config(path)
    _check_overrides(remaining, config)
    try:
        config_flags.DEFINE_config_dict("config", config, "Settings of the recipe.", values, sys_argv=remaining)
        text("config_path", path, "")
        rest = values(remaining)
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{_message(error)}. {usage}") from error
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise UserError(_message(error)) from error
    if len(rest) > 1:
        raise UserError(f"Stray argument {rest[1]!r}: every option starts with --. {usage}")
    if values.workdir == "":
        raise UserError("--workdir is empty: name a directory (a dot is this one), or leave the option out.")
    if values.workdir is None:
        values.workdir = str(Path(default_workdir) / "_".join(filter(None, (Path(name).stem, variant.replace("/", "_")))))
    return values


def load_config(path: str):
    """The config in `FILE.py` or `FILE.py:variant`, with the loop's defaults for what it leaves out.

    Raises:
      UserError: the file cannot be read as one.
    """
    name, _, variant = path.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", name)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(variant) if variant else module.get_config()
        for key, default in Settings.defaults().items():
            if key not in config:
                config[key] = config_dict.placeholder(int) if default is None else default
        return config
    except Exception as error:  # a config is code, and what code raises has no end
        raise UserError(f"--config={path} cannot be used: {type(error).__name__}: {_message(error)}") from error


def _check_overrides(argv, config) -> None:
    """Names the nearest key of an override that the config does not have.

    A section called `options` takes any: which there are depends on the method that they are for, which checks them.
    """
    for arg in argv[1:]:
        name, equals, value = arg.lstrip("-").partition("=")
        if not arg.startswith("-") or not name.startswith("config."):
            continue
        section, done = config, "config"
        for key in name.split(".")[1:]:
            is_section = hasattr(section, "keys")
            keys = list(section.keys()) if is_section else []
            if key not in keys and is_section and done.endswith("options"):
                if not equals:
                    raise UserError(f"--{name}: an option that the config does not name is given as --{name}=VALUE.")
                section[key] = _literal(value)
            elif key not in keys:
                hint = did_you_mean(key, keys)
                there = f"It has: {', '.join(keys)}." if keys else "It is a value, not a section."
                raise UserError(f"--{name}: {done} has no {key!r}{hint} {there}")
            section, done = section[key], f"{done}.{key}"


def _literal(text: str):
    """The Python value that a text is, or else the text."""
    try:
        return {"true": True, "false": False}[text] if text in ("true", "false") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _take_config(argv) -> tuple[str | None, list[str]]:
    """The argument of `--config`, and all else."""
    path, remaining, arguments = None, [], iter(argv)
    for arg in arguments:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            path = value if equals else next(arguments, None)
        else:
            remaining.append(arg)
    return path, remaining


def _available(path) -> str:
    folder = Path(path).parent
    found = sorted(str(file) for file in folder.glob("*.py") if not file.name.startswith("_")) if folder.is_dir() else []
    return f" There are: {', '.join(found)}." if found else ""


def _message(error) -> str:
    """The sentence in an error, without the traceback that config_flags pastes into some."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines) or type(error).__name__


def _complain(text: str) -> int:
    print(
        textwrap.fill("Error: " + " ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False), file=sys.stderr
    )
    return 2
