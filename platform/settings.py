"""What all config objects have in common."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
SETTINGS: Final = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
"""A section of a config never changes, and unknown fields are refused."""
