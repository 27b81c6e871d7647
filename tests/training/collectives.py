"""What devices tell each other in a compiled program."""

import re
from typing import NamedTuple

_LINE = re.compile(r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


class Collective(NamedTuple):
    kind: str
    entries: int  # numbers that every device ends up with, over all arrays of a combined operation
    computation: str  # where it is: "ENTRY", or a loop's or a branch's name
    scope: str  # of the code it comes from


def collectives(compiled) -> list[Collective]:
    """The collective operations of a compiled function, those of loops and branches included."""
    found, computation = [], ""
    for line in compiled.as_text().splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            computation = line.split()[0].lstrip("%")
        if match := _LINE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match["shape"])
            sizes = [eval("*".join(shape.split(",")) or "1") for shape in shapes]
            scope = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match["kind"], sum(sizes), computation, scope[1] if scope else ""))
    return found
