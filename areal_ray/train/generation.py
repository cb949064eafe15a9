"""Texts that a sharded model makes of prompts while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from areal_ray.config import GenerateConfig
from areal_ray.distributed import Ranks
from areal_ray.engine import TrainEngine

_WIDTH = 32  # rows are as wide as a multiple of it: kernels and compiled graphs see few shapes


class Generation:
    """An Evaluation that goes on with prompts and writes down what comes of them; it has no metrics.

    Every rank computes the same rows, and rank 0 chooses the tokens: what is chosen does not depend on the number of
    ranks but for rounding. It draws from a generator of its own, and the training's random state is left alone. Nothing
    is cached between tokens: each costs a forward pass of the sharded model over all rows, with its gathers.

    Args:
        engine: with the model.
        ranks: all ranks.
        config: how many tokens, and how they are chosen.
        prompts: token ids of each, one at least.
        ends: ids after which a text has ended.
        vocabulary: ids that the tokenizer knows are below it; the model may have more rows.
        seed: of the draws, with the step and the number of the prompt.
        write: takes the step and the new tokens of each prompt; called on rank 0.
        alive: called before every token.
    """

    def __init__(
        self,
        engine: TrainEngine,
        ranks: Ranks,
        config: GenerateConfig,
        prompts: Sequence[Sequence[int]],
        ends: Collection[int],
        vocabulary: int,
        seed: int,
        write: Callable[[int, list[list[int]]], None],
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        assert all(prompts)
        self._engine, self._ranks, self._config, self._prompts = engine, ranks, config, prompts
        self._ends, self._vocabulary, self._seed = set(ends), vocabulary, seed
        self._write, self._alive = write, alive

    def run(self, step: int) -> Mapping[str, float]:
        made: list[list[int]] = [[] for _ in self._prompts]
        drawing = [torch.Generator().manual_seed(_mixed(self._seed, step, i)) for i in range(len(made))]
        for _ in range(self._config.max_new_tokens):
            going = [i for i, tokens in enumerate(made) if not tokens or tokens[-1] not in self._ends]
            if not going:
                break
            self._alive()
            logits = self._engine.next_logits(*self._rows(made))
            chosen = None
            if self._ranks.rank == 0:
                known = logits[:, : self._vocabulary].double().cpu()
                chosen = [self._choose(known[i], drawing[i]) for i in going]
            chosen = self._ranks.broadcast(chosen)
            assert chosen is not None
            for i, token in zip(going, chosen, strict=True):
                made[i].append(token)
        if self._ranks.rank == 0:
            self._write(step, made)
        return {}

    def _rows(self, made: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """All texts so far, and where each of them ends. What fills a row behind its end is not attended to."""
        texts = [[*prompt, *more] for prompt, more in zip(self._prompts, made, strict=True)]
        longest = max(map(len, self._prompts)) + self._config.max_new_tokens
        width = min(-(-max(map(len, texts)) // _WIDTH) * _WIDTH, longest)
        rows = torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        return rows, torch.tensor([len(text) - 1 for text in texts])

    def _choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        if self._config.temperature == 0:
            return int(logits.argmax())
        if self._config.top_k is not None and self._config.top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(self._config.top_k).values[-1], -torch.inf)
        shares = (logits / self._config.temperature).softmax(-1)
        return int(torch.multinomial(shares, 1, generator=generator))


def _mixed(*numbers: int) -> int:
    """A seed of several numbers, other ones for others."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return mixed


def texts(
    prompts: Sequence[str], made: Sequence[Sequence[int]], ends: Collection[int], decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """What is written of each prompt: itself, the text that was made of it, its tokens, and whether it has ended."""
    found = []
    for prompt, tokens in zip(prompts, made, strict=True):
        ended = bool(tokens) and tokens[-1] in ends
        plain = list(tokens[:-1] if ended else tokens)
        found.append({"prompt": prompt, "text": decode(plain), "tokens": list(tokens), "ended": ended})
    return found
