"""Types of the keyword arguments of the client's calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict


class BatchOptions(TypedDict, total=False):
    """Options that describe the rows of a batch: padding, prompts and segments."""

    lengths: Any
    """Integers [rows]: tokens after a row's length are padding."""
    prompt_mask: Any
    """bool [rows, columns]: True at positions that are given and never masked."""
    segment_ids: Any
    """Integers [rows, columns]: the document of each token of a packed row, from 0 and not decreasing."""


class FitOptions(BatchOptions, total=False):
    """Options that `fit` accepts and passes to each step."""

    only_train_generator: bool
    """Compute and train the generator alone."""
    only_train_critic: bool
    """Train the critic alone."""
    generator_sample_temperature: float | None
    """Temperature at which the critic's input is sampled, 0 for the most probable token; None: drawn from
    [0, 1) for each step.
    """


class StepOptions(FitOptions, total=False):
    """Options of a training step, as in `Trainer.train_step`."""

    batches: Sequence[Any]
    """Batches that replace `tokens`: their rows, in this order, are the batch of one step. Each is a
    `maskwire.Batch` or rows of token ids.
    """
    learning_rate: float | None
    """Learning rate of this step alone, instead of the schedule's."""


class EvalOptions(TypedDict, total=False):
    """Options of an evaluation, as in `Client.eval_loss` and `Client.evaluate`."""

    lengths: Any
    """Integers [rows]: tokens after a row's length are padding."""
    prompt_mask: Any
    """bool [rows, columns]: True at positions that are given and never masked."""
    segment_ids: Any
    """Integers [rows, columns]: the document of each token of a packed row, from 0 and not decreasing."""
    row_ids: Sequence[int]
    """Seeds of the rows' draws: the same id, seed and draws give the same result in any batch."""
    draws: int
    """Draws per row; 0: 16, or the server's maximum if that is lower. With the chain rule: orders per row;
    0: one order.
    """
    seed: int
    """Seed of the draws."""
    only_train_generator: bool
    """Compute the losses that training with `only_train_generator` would give."""
    only_train_critic: bool
    """Compute the losses that training with `only_train_critic` would give."""
    generator_sample_temperature: float | None
    """Temperature of the critic's input, as in training; None: drawn from the evaluation's seed."""
    raw_weights: bool
    """Evaluate the trained weights even if the run keeps a moving average."""
    text_bytes: int | None
    """Bytes of text that the batch encodes; needed for bits per byte."""
    estimator: Literal["systematic", "chain_rule"]
    """systematic: the negative ELBO from systematic draws; chain_rule: the exact likelihood, one pass per
    token.
    """
    chain_order: Literal["left_to_right", "random"]
    """Order of the positions in the chain rule; random: another order for each draw."""


class GenerateOptions(TypedDict, total=False):
    """Options of a generation, as in `Client.generate`."""

    lengths: Any
    """Integers [rows]: tokens after a prompt's length are padding."""
    prompt_mask: Any
    """bool [rows, columns]: True where the prompt's token is given; None: all but the mask id are given."""
    count: int | None
    """Rows to sample, 1 by default; with prompts: only the first `count` of them, by default all."""
    length: int
    """Tokens per row, 0 for the model's maximum; with prompts: the width to compute at, 0 for the prompts'
    own.
    """
    steps: int
    """Unmasking passes; 0: one position per pass."""
    order: str
    """random, confidence, margin, entropy or critic."""
    temperature: float | None
    """Sampling temperature of every pass, 0 for the most probable token; None: 1, unless there is a
    `start_temperature`."""
    start_temperature: float | None
    """Sampling temperature that falls over the passes, in place of `temperature`: pass s of S has
    start_temperature * (1 - s/S), and the last one takes the most probable token.
    """
    filter_thres: float | None
    """Share of the vocabulary to drop: sample from the ceil((1 - filter_thres) * num_tokens) most probable
    tokens; None: 0.
    """
    top_k: int
    """Sample from the `top_k` most probable tokens; 0: from all."""
    top_p: float | None
    """Sample from the most probable tokens whose total probability is `top_p`; None: 1."""
    choice_temperature: float | None
    """Temperature of the noise on the order; None: the preset's."""
    remasking: bool
    """Mask the lowest-ranked revealed positions again. Needs the order confidence or critic."""
    self_cond_mode: str
    """two_pass (the model that `eval_loss` evaluates) or carry."""
    raw_weights: bool
    """Sample from the trained weights even if the run keeps a moving average."""
    row_seeds: Sequence[int]
    """One seed per row, so that a row's sample does not depend on the other rows."""
    seed: int
    """Seed of the first row if `row_seeds` is not given; each further row has the next number."""


class ListOptions(TypedDict, total=False):
    """Options that select a range of recorded steps, as in `Client.list_steps`."""

    run_id: str
    """The run's id: WrongRunError is raised if the server has another run; empty: any run."""
    lineage: int
    """The lineage; 0: the newest. A lineage's steps come after the step that it started from."""
    first_step: int
    """First step; 0: the lineage's first."""
    last_step: int
    """Last step, inclusive; 0: the lineage's last."""
