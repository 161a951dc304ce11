"""The programs of an engine, compiled for a device that is not here."""

import functools
from collections.abc import Callable

from jaxdet.engine.engine import Engine
from jaxdet.engine.step import Step


def compile_programs(engine: Engine, compile_for: Callable, only: str = "") -> None:
    """Compiles what the engine may need; its steps have those programs then, as after a start.

    Args:
        compile_for: takes a function, its operands and how to jit it.
        only: the name of those to compile; all of them by default.
    """
    for job in engine.wanted.jobs(lambda step: _compiler(step, compile_for, only)):
        job()


def _compiler(step: Step, compile_for: Callable, only: str) -> Step:
    """A twin whose methods, given shapes, compile their program into `step.programs`."""

    def compile_(name, key, *args, told=None, **static):
        if only in ("", name):
            program = step._program(name, *args, told=told, **static)
            function = functools.partial(program.function, **program.static)
            step._programs[name, key] = compile_for(function, *program.args, jit=program.jit)

    return step._twin(compile_)
