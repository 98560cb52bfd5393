"""Train a copy head on a frozen decoder that reads each sequence once.

The decoder's states are stored before (see [`evaluation_retro.decoder_states`]), and training on
them takes seconds:

    stored = [store_batch(model, batch) for batch in batches]  # batches of `RetroDataCollator`
    fit_reader(model, stored, steps=300)
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from configuration_retro import RetroConfig
from evaluation_retro.decoder_states import Batch, check_reader
from modeling_retro import RetroForCausalLM
from modeling_retro.copy_head import CopyHead

BATCH = 4  # sequences in a training step
LEARNING_RATE = 2e-3
WARMUP_STEPS = 10

Progress = Callable[[Sequence[int]], Iterable[int]]  # goes through the steps, and shows a bar if you like


def fit_copy_head(
    config: RetroConfig, batches: Sequence[Batch], steps: int, seed: int = 0, progress: Progress = iter
) -> CopyHead:
    """Train a copy head on the positions in reach of neighbors; the decoder stays as it is.

    Args:
        config: the copy head's.
        batches: each step takes one, in random order.
        seed: of that order. The same seed gives the same copy head.
        progress: goes through the steps: `tqdm`, `rich.progress.track`, or nothing to see.

    Raises:
        ValueError: there are no batches, or no steps.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}. Give at least 1.")
    if not batches:
        raise ValueError("There are no batches to train on. Store at least one.")
    head = CopyHead(config)
    head.init_weights()
    head.to(batches[0].states.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in progress(range(steps)):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        loss = batches[order.pop()].nats(head, config.chunk_size - 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def fit_reader(
    model: RetroForCausalLM, batches: Sequence[Batch], steps: int, seed: int = 0, progress: Progress = iter
) -> None:
    """Train a copy head on stored batches, and put it into the model in place of its own.

    Args:
        model: the model that stored the batches.
        batches, steps, seed, progress: see [`fit_copy_head`].

    Raises:
        ValueError: the model reads in another way, or there are no batches.
    """
    check_reader(model)
    fitted = fit_copy_head(model.config, batches, steps, seed, progress)
    model.copy_head.load_state_dict(fitted.state_dict())
