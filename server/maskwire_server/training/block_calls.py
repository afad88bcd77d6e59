"""Check that every pass of a network calls its blocks in one order.

Ranks gather the weights of a block when it is called, and again in its backward pass. If a rank called
another block than the other ranks, it would get the weights of theirs, or wait forever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from maskwire_server.errors import ConfigError
from maskwire_server.training.models.backbone import Backbone

CURE = (
    "every pass of a model that is divided among ranks must call the same blocks in the same order, and use "
    "their outputs: call every block in every pass, skip inside it (multiply what it adds by 0), or train "
    "with one process"
)
Hook = Callable[..., None]


@dataclass(frozen=True)
class CallOrder:
    """The order of the calls of a network's blocks."""

    blocks: list[int]
    """The numbers of the blocks that a pass calls."""
    backward: list[int]
    """The indices of these calls in the order of their backward passes."""


@dataclass
class _Pass:
    blocks: list[int] = field(default_factory=list)
    differentiable: set[int] = field(default_factory=set)
    """The indices of the calls whose output requires a gradient."""
    backward: list[int] = field(default_factory=list)


class BlockCalls:
    """Records the calls of a network's blocks. With an `expected` order, any other raises ConfigError.

    The error is raised before the weights of the wrong block are gathered.
    """

    def __init__(self, network: Backbone, expected: CallOrder | None = None) -> None:
        self._expected = expected
        self._pass = _Pass()
        self._passes: list[_Pass] = []
        """All passes; with an expected order, only those whose backward pass has begun and not ended."""
        # Hooks with `prepend` run before those of `fully_shard` that exist already.
        self._numbers = {id(block): number for number, block in enumerate(network.blocks)}
        hooks: list[tuple[nn.Module, Hook, Hook]] = [(network, self._begin, self._end)]
        hooks += [(block, self._call, self._return) for block in network.blocks]
        self._hooks = []
        for module, before, after in hooks:  # compiled blocks call the hooks as they are, as `fully_shard`'s
            self._hooks += [
                module.register_forward_pre_hook(torch.compiler.disable(before), prepend=True),  # type: ignore[no-untyped-call]
                module.register_forward_hook(torch.compiler.disable(after), prepend=True),  # type: ignore[no-untyped-call]
            ]

    def order(self) -> CallOrder:
        """The order of all passes so far. Raises ConfigError if they differ."""
        first = self._passes[0].blocks if self._passes else []
        backward = next((each.backward for each in self._passes if each.backward), [])
        for each in self._passes:
            if each.blocks != first:
                raise ConfigError(
                    f"distributed: one pass called the blocks {first}, another {each.blocks}; {CURE}"
                )
            if each.backward not in ([], backward):
                one, other = ([first[call] for call in calls] for calls in (backward, each.backward))
                raise ConfigError(
                    f"distributed: one backward pass used the outputs of the blocks {one}, another those of "
                    f"{other}; {CURE}"
                )
        return CallOrder(first, backward)

    def check_complete(self) -> None:
        """Raise ConfigError if a backward pass has ended without that of a block."""
        for each in self._passes:
            self._refuse(f"ended its backward pass without block {each.blocks[self._missing(each)[0]]}")

    def remove(self) -> None:
        """Stop recording."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        self._pass = _Pass()
        if self._expected is None:
            self._passes.append(self._pass)

    def _call(self, block: nn.Module, _: object) -> None:
        if _recomputes():
            return
        calls, number = self._pass.blocks, self._numbers[id(block)]
        if self._expected is not None:
            rest = self._expected.blocks[len(calls) :]
            if rest[:1] != [number]:
                self._refuse(f"called block {number} instead of {f'block {rest[0]}' if rest else 'none'}")
        calls.append(number)

    def _return(self, _block: nn.Module, _given: object, output: object) -> None:
        if _recomputes() or not torch.is_grad_enabled():
            return
        own, call = self._pass, len(self._pass.blocks) - 1
        for each in tree_leaves(output):
            if isinstance(each, torch.Tensor) and each.requires_grad:
                own.differentiable.add(call)
                each.register_hook(lambda _: self._go_back(own, call))  # type: ignore[no-untyped-call]

    def _go_back(self, own: _Pass, call: int) -> None:
        if call in own.backward:  # of another output of the block
            return
        if self._expected is not None:
            missing = self._missing(own)
            if missing[:1] != [call]:
                instead = f"block {own.blocks[missing[0]]}" if missing else "none"
                self._refuse(f"began the backward pass of block {own.blocks[call]} instead of {instead}")
            if not own.backward:
                self._passes.append(own)
        own.backward.append(call)
        if self._expected is not None and not self._missing(own):
            self._passes.remove(own)

    def _missing(self, own: _Pass) -> list[int]:
        """The calls whose backward passes are still to come, in order."""
        assert self._expected is not None
        return [
            call
            for call in self._expected.backward
            if call in own.differentiable and call not in own.backward
        ]

    def _end(self, *_: object) -> None:
        if self._expected is not None and self._pass.blocks != self._expected.blocks:
            self._refuse(f"ended after the blocks {self._pass.blocks} instead of {self._expected.blocks}")

    def _refuse(self, what: str) -> None:
        raise ConfigError(f"distributed: a pass {what}; {CURE}")


def _recomputes() -> bool:
    """Whether a backward pass is running: activation checkpointing then calls blocks once more."""
    return bool(torch._C._current_graph_task_id() != -1)
