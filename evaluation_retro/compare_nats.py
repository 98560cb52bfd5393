"""The nats that each row of the comparison needs for the last chunk of each window, kept on disk.

All rows predict the same tokens after the same text, and have the same neighbors. The decoder alone
computes what rivals need; nothing of RETRO takes part. What a rival can choose, such as the copy
baseline's weight, it chooses on windows of training texts.

Shapes: N windows of T tokens, m tokens in the last chunk.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .compare_rows import SEPARATOR, Method, Row, RowSettings
from .copy_baseline import WEIGHTS, best_weight, copied_probability, mixture_nats
from .found import Found, kept_find
from .in_context import in_context_nats, in_context_prompts
from .kept import Arrays, Kept
from .key_building import build_keys, knowledge_texts
from .key_store import KeyStore
from .knn_lm import KeysFound, KnnSettings, choose_knn, find_keys
from .measuring import WindowNats, configured
from .opening import Opened
from .overlap import shared_runs
from .replug import replug_nats
from .retro_in_context import retro_in_context_nats
from .windows import Windows

WINDOWS_KEPT = 8  # in one file: a break loses at most so many
HELD_OUT, TRAINING = "held_out", "training"


class RowNats:
    """The nats (N,) of each window's last chunk, by row.

    Args:
        opened: RETRO and its knowledge base.
        decoder: RETRO's decoder alone.
        windows: what is measured.
        training: windows of training texts, on which rivals choose their settings.
        settings: of the rows.
        kept: the folder that keeps all results.
        most: neighbors that are found for each point. Rows with fewer take the best ones.
        seed: of shuffled neighbors, and of the texts that kNN-LM's keys are made of.
    """

    def __init__(
        self,
        opened: Opened,
        decoder: PreTrainedModel,
        windows: Windows,
        training: Windows,
        settings: RowSettings,
        kept: Kept,
        most: int,
        seed: int,
    ) -> None:
        assert opened.retriever is not None, "there is a knowledge base to compare with"
        self.model, self.decoder, self.retriever = opened.model, decoder, opened.retriever.with_neighbors(most)
        self.windows = {HELD_OUT: windows, TRAINING: training}
        self.settings, self.kept, self.seed = settings, kept, seed
        self.chunk = opened.model.config.chunk_size
        self.first = windows.tokens.shape[1] - self.chunk - 1  # the position that predicts the chunk's first token
        self.separator = opened.tokenizer.encode_batch([SEPARATOR])[0]
        self.retro = WindowNats(opened.model, windows, kept, HELD_OUT, settings.batch_size)
        self.found = cache(self._found)
        self.copy_weight = cache(self._copy_weight)
        self._keys: KeyStore | None = None

    def of(self, row: Row) -> np.ndarray:
        """Return the nats (N,) of a row, measured or from the folder."""
        row = row.without_drafts
        measure: dict[Method, Callable[[Row], np.ndarray]] = {
            Method.DECODER: lambda row: self._decoder(HELD_OUT),
            Method.COPY_BASELINE: self._copy_baseline,
            Method.IN_CONTEXT: partial(self._prompted, self._in_context),
            Method.KNN_LM: lambda row: self._keys_found(HELD_OUT).mixed(self.knn).numpy(),
            Method.REPLUG: partial(self._prompted, self._replug),
            Method.RETRO: lambda row: self.retro.on(row.key, self._read(row)),
            Method.SHUFFLED: lambda row: self.retro.on(row.key, self._read(row).shuffled(self.seed)),
            Method.OFF: lambda row: self.retro.off(),
            Method.BOTH: partial(self._prompted, self._both),
        }
        return measure[row.method](row)[:, -self.chunk :].astype(np.float64).sum(1)

    def chosen(self, row: Row) -> dict[str, float] | None:
        """Return what a row chose on the training windows; None if it has nothing to choose."""
        if row.method is Method.KNN_LM:
            return asdict(self.knn)
        if row.method is Method.COPY_BASELINE:
            assert row.k is not None and row.stride is not None, "the copier has neighbors"
            return {"weight": self.copy_weight(row.k, row.stride)}
        return None

    def repeated(self) -> dict[str, float]:
        """Return the share of windows whose neighbors hold a chunk's length of their own text.

        A few are quotations. Many are a sign that the windows' documents are in the knowledge base
        under other ids, and so were not left out.
        """
        shares = {}
        for name, windows in self.windows.items():
            runs = shared_runs(windows.tokens, self.found(name, self.chunk), self.chunk, with_query=True)
            shares[name] = float((runs[:, -1] >= self.chunk).mean())
        return shares

    def close(self) -> None:
        """Close the keys of kNN-LM."""
        if self._keys is not None:
            self._keys.close()
            self._keys = None

    def _found(self, name: str, stride: int) -> Found:
        return kept_find(self.kept, name, self.retriever, self.windows[name], stride)

    def _read(self, row: Row) -> Found:
        """Return the neighbors that a row reads."""
        assert row.k is not None and row.stride is not None, "these rows have neighbors"
        return self.found(HELD_OUT, row.stride).best(row.k)

    # The decoder, alone and with the copier

    def _decoder(self, name: str) -> np.ndarray:
        """Return the decoder's nats (N, m) of the last chunks."""
        tokens = self.windows[name].tokens

        @torch.no_grad()
        def measure(part: range) -> Arrays:
            nats = []
            for batch in tokens[part.start : part.stop].to(self.decoder.device).split(self.settings.batch_size):
                logits = self.decoder(input_ids=batch, logits_to_keep=self.chunk + 1, use_cache=False).logits[:, :-1]
                targets = batch[:, -self.chunk :]
                nats.append(F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none"))
            return {"nats": torch.cat(nats).cpu().numpy()}

        return self.kept.parts(f"decoder_{name}", len(tokens), WINDOWS_KEPT, measure)["nats"]

    def _copier(self, name: str, k: int, stride: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the decoder's nats, the copier's probability and its finds, (N, m) each."""
        tokens, found = self.windows[name].tokens, self.found(name, stride).best(k)
        parts = []
        for start in range(0, len(tokens), WINDOWS_KEPT):
            rows = slice(start, start + WINDOWS_KEPT)
            read = tokens[rows], found.ids[rows], found.mask[rows]
            parts.append(copied_probability(*read, self.chunk, retrieval_stride=stride))
        copied, there = (torch.cat(part)[:, self.first :] for part in zip(*parts, strict=True))
        return torch.from_numpy(self._decoder(name)), copied, there

    def _copy_weight(self, k: int, stride: int) -> float:
        """Return the copier's weight under which the training windows have the fewest nats."""
        copier = self._copier(TRAINING, k, stride)
        totals = torch.stack([mixture_nats(*copier, weight).double().sum() for weight in WEIGHTS.tolist()])
        weight = best_weight(totals)
        assert weight is not None, "the training windows have tokens"
        return weight

    def _copy_baseline(self, row: Row) -> np.ndarray:
        assert row.k is not None and row.stride is not None, "the copier has neighbors"
        weight = self.copy_weight(row.k, row.stride)
        return mixture_nats(*self._copier(HELD_OUT, row.k, row.stride), weight).numpy()

    # Neighbors in the prompt

    def _prompted(self, measure: Callable[[Row, torch.Tensor, Found], torch.Tensor], row: Row) -> np.ndarray:
        """Return nats (N, m), measured in parts and kept.

        Args:
            measure: returns the nats (n, T − 1) of some windows, given their neighbors.
        """
        tokens, found = self.windows[HELD_OUT].tokens, self._read(row)

        def part(rows: range) -> Arrays:
            here = slice(rows.start, rows.stop)
            nats = measure(row, tokens[here].to(self.decoder.device), found.rows(here))
            return {"nats": nats[:, self.first :].cpu().numpy()}

        return self.kept.parts(row.key, len(tokens), WINDOWS_KEPT, part)["nats"]

    def prompt_settings(self, row: Row) -> dict[str, Any]:
        """Return how a row's prompts are made: separator and window."""
        window = self.windows[HELD_OUT].tokens.shape[1]
        return {"separator": self.separator, "max_tokens": None if row.long_window else window}

    def _prompts(self, row: Row, tokens: torch.Tensor, found: Found) -> list:
        return in_context_prompts(
            tokens,
            found.ids,
            found.mask,
            self.chunk,
            retrieval_stride=row.stride,
            first=self.first,
            **self.prompt_settings(row),
        )

    def _in_context(self, row: Row, tokens: torch.Tensor, found: Found) -> torch.Tensor:
        return in_context_nats(self.decoder, self._prompts(row, tokens, found), tokens)

    def _replug(self, row: Row, tokens: torch.Tensor, found: Found) -> torch.Tensor:
        neighbors = found.inputs.to(tokens.device)
        return replug_nats(
            self.decoder,
            tokens,
            neighbors.ids,
            neighbors.mask,
            neighbors.scores,
            self.chunk,
            retrieval_stride=row.stride,
            first=self.first,
            **self.prompt_settings(row),
        )

    def _both(self, row: Row, tokens: torch.Tensor, found: Found) -> torch.Tensor:
        with configured(self.model.config, found):
            return retro_in_context_nats(self.model, self._prompts(row, tokens, found), found.inputs, tokens)

    # kNN-LM

    @property
    def keys(self) -> KeyStore:
        """The keys of kNN-LM, which are made first if they are not there."""
        if self._keys is None:
            settings = self.settings.key_settings(str(self.kept.folder / "knn_keys.db"))
            texts = knowledge_texts(self.retriever.store, settings.max_keys, self.seed)
            self._keys = build_keys(self.decoder, texts, settings)
        return self._keys

    @cached_property
    def knn(self) -> KnnSettings:
        """The settings of kNN-LM, chosen on the training windows."""
        return choose_knn([self._keys_found(TRAINING)])

    def _keys_found(self, name: str) -> KeysFound:
        """Return the keys found for the last chunks (N, m)."""
        windows, settings = self.windows[name], self.settings
        made = f"{settings.max_keys} {settings.key_window} {settings.key_context} {settings.key_index}"
        of_keys = hashlib.sha256(made.encode()).hexdigest()[:8]

        def find(rows: range) -> Arrays:
            tokens = windows.tokens[rows.start : rows.stop].to(self.decoder.device)
            own = [[doc_id] for doc_id in windows.doc_ids[rows.start : rows.stop]]
            found = find_keys(self.decoder, self.keys, tokens, own, first=self.first)
            return {key: tensor[:, self.first :].numpy() for key, tensor in vars(found).items()}

        stored = self.kept.parts(f"knn_lm_{of_keys}_{name}", len(windows), WINDOWS_KEPT, find)
        return KeysFound(**{key: torch.from_numpy(array) for key, array in stored.items()})
