"""Settings that are given: what others come from is refused, not read. Upon pydantic or the stand-in for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

SettingsConfigDict = dict


class SettingsError(ValueError):
    pass


class PydanticBaseSettingsSource:
    pass


class TomlConfigSettingsSource(PydanticBaseSettingsSource):
    pass


class BaseSettings(BaseModel):
    def __init__(self, **given: Any) -> None:
        prefix, file = self.model_config["env_prefix"], Path(self.model_config["toml_file"])
        found = [name for name in map(str.upper, type(self).model_fields) if os.environ.get(prefix + name)]
        if found:
            raise SettingsError(f"without pydantic-settings {prefix}{found[0]} is not read; unset it")
        if file.exists():
            raise SettingsError(f"without pydantic-settings {file} is not read; move it away")
        super().__init__(**given)
