"""RETRO as a model of EleutherAI's lm-eval, with a retrieval point at the end of each context.

Importing this module registers the model `retro`. `retro-lm-eval` is lm-eval's command line with
this model; in Python, give a [`RetroLM`] to `lm_eval.simple_evaluate`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_retro import RetroForCausalLM
from modeling_retro.vocabulary import suppress_padding_ids
from retrieval.arguments import KnowledgeBaseArguments

from .continuations import Continuation, score_continuations
from .opening import check_reads

# lm-eval's requests: the texts, or None for part of a rolling text; tokens of context and answer
Request = tuple[tuple[str, str] | None, list[int], list[int]]
SEARCHES_KEPT = 10_000  # chunks whose neighbors are remembered: each choice of a question repeats its context


class TrainedRetro:
    """Opens RETRO models for lm-eval, and refuses those that cannot read neighbors."""

    @staticmethod
    def from_pretrained(name: str, **kwargs: Any) -> RetroForCausalLM:
        """Open a model as `RetroForCausalLM.from_pretrained` does.

        Raises:
            ValueError: the model is to read neighbors and has no weights for that.
        """
        model, loading = RetroForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
        if model.config.use_retrieval:
            check_reads(model, set(loading["missing_keys"]), name)
        return model


@register_model("retro")
class RetroLM(HFLM):
    """Scores and generates with neighbors from a knowledge base.

    The end of a context is a retrieval point, in `loglikelihood` as in `generate_until`, so that a
    short question is searched for, too. A text without a context (`loglikelihood_rolling`, or an
    empty one) has the paper's points, the ends of chunks.

    Args:
        pretrained: a trained RETRO, or any decoder if there is a `reader`: a Hub name or a folder.
            Or a model in memory, which keeps its retriever if no knowledge base is given.
        reader: RETRO's own weights, saved without their decoder, to put on the model.
        use_retrieval: False measures the decoder alone and opens no knowledge base.
        trust_remote_code: run code that comes with the model or the embedding model.
        **kwargs: knowledge_base, collection_name and the other fields of
            [`KnowledgeBaseArguments`]; arguments of `HFLM` (batch_size, device, dtype, gguf_file,
            peft, max_length, …); settings of `RetroConfig`, such as num_neighbors.

    Raises:
        ValueError: there is no knowledge base, it is another model's, or the model has no weights
            that read neighbors.
        KnowledgeBaseError: the knowledge base cannot be opened, or does not fit the tokenizer.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        reader: str | None = None,
        use_retrieval: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        names = {field.name for field in fields(KnowledgeBaseArguments)} & kwargs.keys()
        named = {name: kwargs.pop(name) for name in names}
        knowledge_base = KnowledgeBaseArguments(trust_remote_code=trust_remote_code, **named)
        has_retriever = "retriever" in kwargs or getattr(pretrained, "retriever", None) is not None
        if use_retrieval and not has_retriever and knowledge_base.knowledge_base is None:
            raise ValueError(
                "knowledge_base is not given, so there are no neighbors to read. Name a Milvus Lite file or a server, "
                "or give use_retrieval=False to measure the decoder alone."
            )
        if isinstance(pretrained, str):
            kwargs |= {"use_retrieval": use_retrieval} | ({} if reader is None else {"reader": reader})
        # adapters may bring the weights that read neighbors
        self.AUTO_MODEL_CLASS = RetroForCausalLM if "peft" in kwargs else TrainedRetro
        super().__init__(pretrained, backend="causal", trust_remote_code=trust_remote_code, **kwargs)
        self._config = self.model.config  # RETRO's, also where the name is another decoder's
        self._model_arguments: dict[str, Any] = {} if use_retrieval else {"use_retrieval": False}
        suppress_padding_ids(self.model, self.tokenizer)
        if use_retrieval and knowledge_base.knowledge_base is not None:
            self.model.set_retriever(
                knowledge_base.open_retriever(
                    self.tokenizer,
                    collection_name=self.config.collection_name,
                    num_neighbors=self.config.num_neighbors,
                    neighbor_length=self.config.neighbor_length,
                    cache_size=SEARCHES_KEPT,
                )
            )

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Return the logits (B, T, V) of a batch from which lm-eval finds the batch size."""
        with torch.no_grad(), self._mixed_precision():
            return self.model(inps, **self._model_arguments).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Return contexts with what follows them. `generate` places a point at a context's end."""
        return super()._model_generate(context, max_length, stop, **self._model_arguments, **kwargs)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and True if greedy decoding would write it.

        Log-likelihoods are computed in float32. A context that is too long loses its beginning.
        """
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number][1] + requests[number][2]))
        batch_size = override_bs or self.batch_size
        if batch_size == "auto":
            batch_size = self._detect_batch_size([requests[number] for number in order])
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [self._row(requests[number]) for number in numbers]
            with self._mixed_precision():
                scores = score_continuations(self.model, rows, self.eot_token_id, self._model_arguments)
            for number, answer in zip(numbers, scores, strict=True):
                answers[number] = answer
                if (texts := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            bar.update(len(numbers))
        bar.close()
        return answers

    def _row(self, request: Request) -> Continuation:
        texts, context, continuation = request
        if len(continuation) > self.max_length:
            raise ValueError(
                f"A continuation has {len(continuation)} tokens, more than the {self.max_length} that the model reads. "
                "Leave such requests out, or give another max_length."
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Continuation(tokens, len(continuation), is_aligned=texts is not None and texts[0] != "")

    @contextlib.contextmanager
    def _mixed_precision(self) -> Iterator[None]:
        dtype = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None):
            yield
