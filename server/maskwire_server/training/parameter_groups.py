"""Which parameters each entry of `optimizer.groups` applies to."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from maskwire_server.config import ParameterGroup
from maskwire_server.errors import ConfigError

Matched = dict[str, ParameterGroup]
"""The group of each parameter that has one, by the parameter's name in its network."""


def trainable(network: nn.Module) -> list[str]:
    """The names of parameters that a network does not freeze itself. Adapters freeze all others."""
    return [name for name, weight in network.named_parameters() if weight.requires_grad]


def matched(groups: Sequence[ParameterGroup], networks: Mapping[str, Sequence[str]]) -> dict[str, Matched]:
    """Find the group of each parameter by its name. The first pattern that matches a name applies.

    A pattern matches a name with or without its network: `blocks.*` or `generator.blocks.*`. Raises
    ConfigError if a pattern is not the first match of any parameter, or if no parameter is left to train.
    """
    found: dict[str, Matched] = {network: {} for network in networks}
    whole = [(network, name) for network, names in networks.items() for name in names]
    for index, group in enumerate(groups):
        matching = [each for each in whole if _matches(group.match, *each)]
        free = [(network, name) for network, name in matching if name not in found[network]]
        if not free:
            raise ConfigError(
                f"optimizer.groups.{index}.match: {_unused(group.match, whole, bool(matching))}"
            )
        for network, name in free:
            found[network][name] = group
    if all(name in frozen(found[network]) for network, name in whole):
        raise ConfigError(
            "optimizer.groups: no parameter is left to train, because the model or train = false freezes all "
            "of them; unfreeze at least one"
        )
    return found


def frozen(matched: Matched) -> set[str]:
    """The names of the parameters whose groups freeze them."""
    return {name for name, group in matched.items() if not group.train}


def _matches(pattern: str, network: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"{network}.{name}", pattern)


def _unused(pattern: str, whole: list[tuple[str, str]], shadowed: bool) -> str:
    if shadowed:
        return (
            f"earlier groups have all parameters that {pattern!r} matches, and only the first match applies; "
            "move this group before them, or delete it"
        )
    names = [name for network, bare in whole for name in (bare, f"{network}.{bare}")]
    prefixes = {
        ".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)
    }
    near = difflib.get_close_matches(pattern, [*sorted(prefixes), *names], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"an example of a name is {names[0]!r}"
    return f"must match the name of a parameter, got {pattern!r}; {hint}"
