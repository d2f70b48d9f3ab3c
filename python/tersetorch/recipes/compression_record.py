"""What a compression leaves beside its file: figures that the file itself does not hold, for the report."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tersetorch.recipes.deep_compression import DeepCompressionRecipe, calibration_words
from tersetorch.storage.arguments import check_regular, target_of, write_whole

SUFFIX = ".record.json"
# Curves of a thousand layers take 2 MB.
MOST_BYTES = 16 << 20
# A record may be a stranger's: no number in it may be one that a page cannot draw.
Count = Annotated[int, Field(ge=0, lt=2**53)]
Percent = Annotated[float, Field(ge=-0.01, le=100.01)]  # a sum of floats may lie a hair beyond
Part = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Point(_Part):
    """A model on the way: what its file takes, and what it gets wrong.

    Attributes:
        label: such as "dense" or "80 % pruned".
        file_bytes: of the file that tersetorch.save writes of it.
        error_percent: of the images that were held out.
    """

    label: str
    file_bytes: Count
    error_percent: Percent


class SensitivityCurves(_Part):
    """One layer pruned at a time.

    Attributes:
        baseline: error of the model as it came, in percent.
        layers: for each layer, (part pruned, error in percent) by rising part.
    """

    baseline: Percent
    layers: dict[str, list[tuple[Part, Percent]]]


class CompressionRecord(_Part):
    """How a file came to be.

    Attributes:
        data: what was trained and counted on, such as "mnist".
        examples: how many were held out to count errors on.
        before: the model as it came.
        after: the model in the file.
        points: the ones between, in the order they came.
        sensitivity: where it was measured.
        recipe: the plan that was followed, as plain data.
        seconds: that all of it took; of the last run only, where it went on from an earlier one.
        sha256: of the file, in hexadecimal digits; empty where nobody knows.
    """

    format: Literal[1] = 1
    data: str
    examples: Count
    before: Point
    after: Point
    points: list[Point] = []
    sensitivity: SensitivityCurves | None = None
    recipe: dict[str, Any] = {}
    seconds: Annotated[float, Field(ge=0, le=1e10)] = 0.0
    sha256: str = ""

    @property
    def how_pruned(self) -> str:
        """How recipe prunes, in words, such as "pruned by magnitude"; empty where it does not, or is none."""
        try:
            stage = DeepCompressionRecipe.from_mapping(self.recipe).prune
            if stage is None:
                return ""
            how = "magnitude" if stage.method == "magnitude" else f"second derivatives, {calibration_words(stage)}"
            return f"pruned by {how}, {'not retrained' if stage.train is None else 'retrained'}"
        except ValueError:  # whatever a file says, a number of thousands of digits too
            return ""

    def is_of(self, file: Path) -> bool:
        """Whether file is the one that this is about, as far as this says."""
        if self.sha256:
            return hashlib.sha256(file.read_bytes()).hexdigest() == self.sha256
        return file.stat().st_size == self.after.file_bytes

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON; the file is whole at any time."""
        where = "CompressionRecord.write"
        write_whole(where, target_of(where, path), self.model_dump_json(indent=1).encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The record that write left, of at most MOST_BYTES.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else, is larger or no regular file.
        """
        check_regular("CompressionRecord", "path", Path(path), MOST_BYTES)
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"CompressionRecord: {os.fspath(path)} must be what 'tersetorch compress' writes beside its file, got "
                f"another at {where} ({first['msg']}); delete it, or name the right one"
            ) from error


def record_path(file: str | os.PathLike[str]) -> Path:
    """Where the record of a .terse file lies: beside it."""
    return Path(file).with_suffix(SUFFIX)
