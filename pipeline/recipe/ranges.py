"""Ranges of a recipe's values: what stands in the annotation of a field beside its type.

``epochs: Annotated[int, AtLeast(1)]`` is checked by ``pipeline.recipe.checks`` and described on the
page that ``pipeline.recipe.page`` makes. None is always allowed where the type allows it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Range(ABC):
    """The valid values of one field."""

    @property
    @abstractmethod
    def text(self) -> str:
        """What a value must be, in words."""

    @property
    def remedy(self) -> str:
        """The end of the message about a value that is not valid."""
        return f"it must be {self.text}"

    @abstractmethod
    def allows(self, value: Any) -> bool:
        """Whether ``value``, which has the type of its field, is valid."""


@dataclass(frozen=True)
class AtLeast(Range):
    """Numbers from ``low`` on; a 0 that turns something off is named."""

    low: float
    below: float | None = None
    """Numbers from here on are not valid either; infinity: they must be finite."""
    off: bool = False
    """Whether the lowest value turns something off."""

    @property
    def text(self) -> str:
        """Such as "at least 1" or "0 (off) or more"."""
        text = f"{self.low:g} (off) or more" if self.off else f"at least {self.low:g}"
        if self.below is None:
            return text
        return f"{text}, and {'finite' if math.isinf(self.below) else f'below {self.below:,g}'}"

    def allows(self, value: Any) -> bool:
        """Whether the number ``value`` is in the range; NaN is not."""
        return bool(value >= self.low and (self.below is None or value < self.below))


@dataclass(frozen=True)
class Between(Range):
    """Numbers from ``low`` to ``high``, both included."""

    low: int
    high: int

    @property
    def text(self) -> str:
        """Such as "between 1 and 100"."""
        return f"between {self.low:,} and {self.high:,}"

    def allows(self, value: Any) -> bool:
        """Whether the number ``value`` is in the range; NaN is not."""
        return bool(self.low <= value <= self.high)


@dataclass(frozen=True)
class Share(Range):
    """Numbers from 0 to 1, without the 0 or the 1 where the field says so."""

    above_zero: bool = False
    below_one: bool = False

    @property
    def text(self) -> str:
        """The interval: a round bracket leaves its end out."""
        return f"in {'(' if self.above_zero else '['}0, 1{')' if self.below_one else ']'}"

    def allows(self, value: Any) -> bool:
        """Whether the number ``value`` is in the interval; NaN is not."""
        left_out = (self.above_zero and value == 0) or (self.below_one and value == 1)
        return bool(0 <= value <= 1) and not left_out


@dataclass(frozen=True)
class Positive(Range):
    """Numbers above 0."""

    @property
    def text(self) -> str:
        """The range in words."""
        return "positive and finite"

    def allows(self, value: Any) -> bool:
        """Whether the number ``value`` is above 0, and neither infinite nor NaN."""
        return bool(0 < value < math.inf)


@dataclass(frozen=True)
class OneOf(Range):
    """A few numbers."""

    numbers: tuple[int, ...]
    note: str
    """Why it is these."""

    @property
    def text(self) -> str:
        """Such as "0, 1 or 2 (the note)"."""
        *first, last = map(str, self.numbers)
        return f"{', '.join(first)} or {last} ({self.note})"

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is one of the numbers."""
        return value in self.numbers


@dataclass(frozen=True, eq=False)
class NameIn(Range):
    """Text that is a key of a table, which may grow."""

    table: Mapping[str, object]
    file: str
    """Where the table stands."""

    @property
    def text(self) -> str:
        """Where the names are."""
        return f"a name in `{self.file}`"

    @property
    def remedy(self) -> str:
        """The end of the message about a name that the table lacks."""
        return f"valid: {', '.join(self.table)}"

    def allows(self, value: Any) -> bool:
        """Whether the table has an entry ``value``."""
        return value in self.table


@dataclass(frozen=True)
class FolderName(Range):
    """Text that names a folder."""

    @property
    def text(self) -> str:
        """The range in words."""
        return "a single folder name"

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is the last part of a path, and not empty."""
        return bool(value) and Path(value).name == value


@dataclass(frozen=True)
class Unquoted(Range):
    """Text that can stand in a quoted search."""

    @property
    def text(self) -> str:
        """The range in words."""
        return "text without quotes"

    def allows(self, value: Any) -> bool:
        """Whether ``value`` holds none of the three quotes."""
        return not set("'\"`") & set(value)


@dataclass(frozen=True)
class NotEmpty(Range):
    """Lists of one item or more."""

    @property
    def text(self) -> str:
        """The range in words."""
        return "a list of one or more"

    def allows(self, value: Any) -> bool:
        """Whether the list ``value`` holds an item."""
        return len(value) > 0
