"""How many instructions the main loop of a compiled kernel has, from its listing by cuobjdump: what a GPU issues at least."""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    # the predicate that it depends on, or ""
    guard: str
    name: str
    operands: str


_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)([^;]*);", re.MULTILINE)
# matrix products and barriers, which no round of a loop goes without
_ALWAYS = re.compile(r"\w*MMA|BAR")


def parse(listing: str) -> list[Instruction]:
    """The instructions of the only kernel in what `cuobjdump -sass` prints."""
    return [Instruction(int(place, 16), guard, name, rest) for place, guard, name, rest in _LINE.findall(listing)]


def successors(code: list[Instruction]) -> list[list[int]]:
    """Where the execution may go on after each instruction, as places in `code`."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    following = []
    for place, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands) if instruction.name == "BRA" else None
        found = [places[int(target[1], 16)]] if target and int(target[1], 16) in places else []
        # a branch without a predicate, in front or among its operands, is always taken
        leaves = not instruction.guard and (
            instruction.name in ("EXIT", "RET")
            or (target is not None and not instruction.operands[: target.start()].strip(" .U"))
        )
        following.append(found + ([] if leaves or place + 1 == len(code) else [place + 1]))
    return following


def largest_loop(following: list[list[int]]) -> set[int]:
    """The largest set of places that can all be reached from each other (the algorithm of R. Tarjan, 1972)."""
    numbers: dict[int, int] = {}
    lowest: dict[int, int] = {}
    path: list[int] = []
    largest: set[int] = set()
    for root in range(len(following)):
        work = [] if root in numbers else [(root, 0)]
        while work:
            place, branch = work.pop()
            if branch == 0:
                numbers[place] = lowest[place] = len(numbers)
                path.append(place)
            if branch > 0:
                lowest[place] = min(lowest[place], lowest[following[place][branch - 1]])
            for number in range(branch, len(following[place])):
                target = following[place][number]
                if target not in numbers:
                    work += [(place, number + 1), (target, 0)]
                    break
                lowest[place] = min(lowest[place], lowest[target])
            else:
                if lowest[place] == numbers[place]:
                    start = path.index(place)
                    found, path = set(path[start:]), path[:start]
                    # what is left behind must not lower what comes later
                    lowest.update(dict.fromkeys(found, len(following)))
                    largest = max(largest, found, key=len)
    return largest


def loop_instructions(listing: str) -> tuple[int, int]:
    """The instructions of a kernel's largest loop, and of the longest part of it that a round may jump over."""
    code = parse(listing)
    following = successors(code)
    loop = largest_loop(following)
    issued = [place for place in sorted(loop) if code[place].name != "NOP"]
    jumped = 0
    for place in loop:
        for target in following[place]:
            between = [other for other in issued if place < other < target]
            if target in loop and not any(_ALWAYS.fullmatch(code[other].name) for other in between):
                jumped = max(jumped, len(between))
    return len(issued), jumped
