"""The search space: which settings a trial may set, in which range, and under which condition.

Which settings may be searched, with which default range and condition, is metadata of their fields
(:class:`retinaflow.settings.value_types.Searched`). A space is written as:

- ``low..high``, uniform, or ``low..high:log``, uniform in the logarithm; both ends are included, and values are whole
  numbers where the setting is one;
- ``a,b,c``, choices without order;
- one value, which fixes the setting.

A setting that has no effect in a trial is not suggested there and has its default, so that the sampler uses only the
trials in which it had an effect. The bins and ``balance`` are suggested where they decide how images are sampled; in
other trials the default bins grade the augmentation between ``augment`` and ``rare_augment``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna

from retinaflow.errors import SettingError
from retinaflow.settings.commands import SearchConfig, TrainConfig, searchable
from retinaflow.settings.resolve import resolve
from retinaflow.settings.value_types import as_text

SEARCHABLE = tuple(searchable())
"""The settings that may be searched, in the order in which they are suggested."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool

    def suggest(self, trial: optuna.Trial, name: str) -> float:
        """A value for this trial; whole when the ends are."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """Values without order."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """A value for this trial."""
        return trial.suggest_categorical(name, self.values)

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return as_text(self.values)


Domain = Range | Choices


@dataclass(frozen=True)
class Space:
    """``base``: the settings before a trial, which are also the defaults that the best trial is compared with."""

    base: TrainConfig
    domains: Mapping[str, Domain]

    def settings(self, trial: optuna.Trial) -> TrainConfig:
        """The settings of a trial, suggested in the order of :data:`SEARCHABLE`."""
        chosen: dict[str, Any] = {}
        for name, domain in self.domains.items():
            if _applies(name, {**self.base.model_dump(), **chosen}):
                chosen[name] = domain.suggest(trial, name)
        return self.with_values(chosen)

    def with_values(self, chosen: Mapping[str, Any]) -> TrainConfig:
        """The base with some of its values replaced."""
        return TrainConfig.model_validate({**self.base.model_dump(), **chosen})

    def starts(self) -> list[dict[str, Any]]:
        """The parameters of the first trials: the defaults, then the defaults with each other sampling strategy.

        A search of few trials then compares the strategies with all else equal, which random trials leave to chance.
        """
        strategies = self.domains.get("sampling")
        others = strategies.values if isinstance(strategies, Choices) else ()
        return [self.defaults(), *(self.defaults(sampling=value) for value in others if value != self.base.sampling)]

    def defaults(self, **changed: Any) -> dict[str, Any]:
        """The defaults, some of them changed, as far as they are in the space."""
        values = {**self.base.model_dump(), **changed}
        return {
            name: values[name]
            for name, domain in self.domains.items()
            if values[name] in domain and _applies(name, values)
        }

    def document(self) -> dict[str, str]:
        """Name -> text, the form in which it is stored with the study."""
        return {name: str(domain) for name, domain in self.domains.items()}


def read_space(config: SearchConfig) -> Space:
    """The space of a search. Raises SettingError naming the setting for a range that is invalid."""
    base = config.part(TrainConfig).model_copy(update={"config": None})
    domains = {name: _domain(name, config.space[name]) for name in SEARCHABLE if name in config.space}
    return Space(base, {name: domain for name, domain in domains.items() if _can_apply(name, base, domains)})


def _domain(name: str, text: str) -> Domain:
    if ".." not in text:
        return Choices(tuple(_checked(name, part.strip()) for part in text.split(",") if part.strip()))
    span, _, scale = text.partition(":")
    low, high = (_checked(name, end) for end in span.split("..", 1))
    if scale not in ("", "log"):
        raise SettingError(f"a range is written low..high or low..high:log, but got {name}={text}")
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise SettingError(f"a range must have numbers as ends, but got {name}={text}; choices are written a,b,c")
    if not low < high:
        raise SettingError(f"low < high must hold, but got {name}={text}")
    if scale == "log" and low <= 0:
        raise SettingError(f"low > 0 must hold for a logarithmic range, but got {name}={text}")
    return Range(low, high, scale == "log")


def _checked(name: str, text: str) -> Any:
    """A value of the setting, by the rules it has in training."""
    return getattr(resolve(TrainConfig, {name: text}), name)


def _applies(name: str, values: Mapping[str, Any]) -> bool:
    return all(values[other] in allowed for other, allowed in searchable()[name].when.items())


def _can_apply(name: str, base: TrainConfig, domains: Mapping[str, Domain]) -> bool:
    """Whether there is a trial in which the setting has an effect."""
    for other, allowed in searchable()[name].when.items():
        domain = domains.get(other)
        values = domain.values if isinstance(domain, Choices) else (getattr(base, other),)
        if not set(values) & set(allowed):
            return False
    return True
