"""Kinds of values that the sections of a config are made of, and what all sections have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError


def _number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as text; give the number it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _whole(value: object) -> object:
    """Token counts are written `1.0e12`; give the whole number."""
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _no_nul(path: Path) -> Path:
    """No file system holds such a path, and Python refuses it with a ValueError."""
    if "\0" in str(path):
        raise PydanticCustomError("nul", "holds a NUL character")
    return path


def _no_address(value: object) -> object:
    """An address may have a password in it, and paths are written to logs and checkpoints."""
    if isinstance(value, str) and "://" in value:
        raise PydanticCustomError("address", "is an address")
    return value


def _one_fault(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """pydantic names a fault for each alternative of a union; give one for the value."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("split", "is not a split") from None


# No run counts so far, and products of a few such counts still have a float.
COUNT_LIMIT = 10**15

# Strict: pydantic would otherwise take `yes` for 1, 2.0 for 2 and "4" for 4.
Count = Annotated[int, Field(strict=True, gt=0, lt=COUNT_LIMIT)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, lt=COUNT_LIMIT)]
# A table of more would take all memory; the largest models known have about a hundred.
Layers = Annotated[int, Field(strict=True, gt=0, lt=10_000)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Tokens = Annotated[int, BeforeValidator(_whole), Field(strict=True, gt=0, lt=COUNT_LIMIT)]
Number = Annotated[float, BeforeValidator(_number), Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]
# A name is a file's too, with a suffix: file systems take 255 bytes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Place = Annotated[Path, BeforeValidator(_no_address), AfterValidator(_no_nul)]
Split = Annotated[Literal["cost", "even"] | tuple[Count, ...], WrapValidator(_one_fault)]


class Strict(BaseModel):
    """Frozen; refuses keys that it does not know; a field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class Section(Strict):
    """A top-level section. Notes each value that is right on its own in the validation context,
    under `section.key`, so that `checks` can run on what is valid while other values are not."""

    @field_validator("*")
    @classmethod
    def _note(cls, value: Any, info: ValidationInfo) -> Any:
        if info.context is not None:
            info.context[f"{cls.__name__.lower()}.{info.field_name}"] = value
        return value
