"""How rows are divided over ranks when a training goes on with another number of them: none is lost, none is trained twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlenv.batch import START, Position


@dataclass(frozen=True)
class Piece:
    """Rows of a window of rows, in the order in which they are trained."""

    epoch: int
    window: int
    rank: int
    """Of the ranks that the window was made for."""
    world_size: int
    """How many those are: with the four numbers and the seed, the rows of the window and their order are known."""
    first: int
    last: int
    """The row after the last one."""


@dataclass(frozen=True)
class Division:
    """Where a number of ranks begins. What is left of the epochs begun by then is dealt out as pieces; later epochs are divided as
    if it had always been that number."""

    step: int = 0
    """Steps that were trained before."""
    epoch: int = -1
    """The last epoch that had been begun; the pieces take its place, and stand for all that was left of it and of those before it."""
    pieces: tuple[tuple[Piece, ...], ...] = ()
    """By rank."""

    @property
    def start(self) -> Position:
        """Where each rank begins."""
        return START if self.epoch < 0 else Position(self.epoch)


def divide_anew(
    before: Division, positions: Sequence[Position], step: int, num_ranks: int, rows_of_windows: Callable[[int, int, int], Sequence[int]]
) -> Division:
    """Deals out what ranks have left.

    Args:
        before: how the rows were divided over them.
        positions: where each of them is after ``step`` steps.
        num_ranks: how many there are now.
        rows_of_windows: rows of each window, for an epoch, a rank, and a number of ranks.
    """
    begun = [position.epoch if (position.window, position.row) != (0, 0) else position.epoch - 1 for position in positions]
    epoch = max(before.epoch, *begun)
    left: list[Piece] = []
    for rank, position in enumerate(positions):
        for number in range(position.epoch, epoch + 1):
            if number == before.epoch:
                windows = before.pieces[rank]
            else:
                sizes = rows_of_windows(number, rank, len(positions))
                windows = tuple(Piece(number, window, rank, len(positions), 0, size) for window, size in enumerate(sizes))
            for place, piece in enumerate(windows):
                here, now = (number, place), (position.epoch, position.window)
                rest = replace(piece, first=piece.first + position.row) if here == now else piece
                if here >= now and rest.first < rest.last:
                    left.append(rest)
    left.sort(key=lambda piece: (piece.epoch, piece.window, piece.rank))
    return Division(step, epoch, _dealt(left, num_ranks))


def division_from(plain: dict[str, Any] | None) -> Division:
    """Of what ``dataclasses.asdict`` and JSON made of one; None was never divided anew."""
    if plain is None:
        return Division()
    pieces = tuple(tuple(Piece(**piece) for piece in of_rank) for of_rank in plain["pieces"])
    return Division(plain["step"], plain["epoch"], pieces)


def _dealt(pieces: Sequence[Piece], num_ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """Whole pieces in turn, each to the rank that has the fewest rows; of the last few, which do not go round, each rank a part."""
    own: list[list[Piece]] = [[] for _ in range(num_ranks)]
    num_rows = [0] * num_ranks
    num_whole = len(pieces) - len(pieces) % num_ranks
    for piece in pieces[:num_whole]:
        rank = num_rows.index(min(num_rows))
        own[rank].append(piece)
        num_rows[rank] += piece.last - piece.first
    for piece in pieces[num_whole:]:
        cuts = [piece.first + (piece.last - piece.first) * part // num_ranks for part in range(num_ranks + 1)]
        for rank in range(num_ranks):
            if cuts[rank] < cuts[rank + 1]:
                own[rank].append(replace(piece, first=cuts[rank], last=cuts[rank + 1]))
    return tuple(map(tuple, own))
