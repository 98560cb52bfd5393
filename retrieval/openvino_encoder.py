"""The transformer of an embedding model, run by OpenVINO on the CPU.

sentence-transformers' own OpenVINO backend needs optimum-intel, whose releases do not go together
with transformers 5.16 and newer. Here OpenVINO itself converts the model when it is loaded.
"""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HIDDEN = "last_hidden_state"
ROWS = 8  # texts that a core computes together; more are slower
EXAMPLE = ["A short text.", "Another text, which is a little longer."]  # conversion follows its shapes


class OpenVinoEncoder:
    """A transformer's forward pass in OpenVINO, with one batch per core at a time.

    OpenVINO computes in bfloat16 where the CPU has instructions for it, else in float32.

    Args:
        model: the transformer.
        example: input tensors of two texts, by the names of the model's arguments.

    Attributes:
        names: the arguments that the converted model takes.
    """

    def __init__(self, model: PreTrainedModel, example: dict[str, torch.Tensor]) -> None:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # or the import reports to Intel
        import openvino

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # those of tracing: each concerns a branch on a shape
            converted = openvino.convert_model(model.eval(), example_input=example)
        threads = torch.get_num_threads()
        settings = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads}
        # OpenVINO gives the thread that compiles a stack for signals, and frees it with the model.
        # The next signal, as of a data loader's worker that ended, would then end the process.
        with ThreadPoolExecutor(1) as thread:
            compiled = thread.submit(lambda: openvino.Core().compile_model(converted, "CPU", settings)).result()
        self._queue = openvino.AsyncInferQueue(compiled)
        self._queue.set_callback(lambda request, place: _keep(request.get_tensor(HIDDEN).data, *place))
        self._turn = threading.Lock()  # the queue belongs to one call at a time
        self._hidden_size: int = model.config.hidden_size
        self.names = [port.any_name for port in converted.inputs]

    def __call__(self, **inputs: torch.Tensor) -> BaseModelOutput:
        """Return the last hidden state (texts, tokens, hidden_size), 0 behind the longest text.

        Args:
            inputs: `input_ids` and `attention_mask` (texts, tokens), and what else the model reads.
        """
        arrays = {name: inputs[name].numpy() for name in self.names}
        mask = inputs["attention_mask"].numpy()
        hidden = np.zeros((*mask.shape, self._hidden_size), dtype=np.float32)
        with self._turn:
            for start in range(0, len(mask), ROWS):
                rows = slice(start, start + ROWS)
                width = 1 + int(mask[rows].any(axis=0).nonzero()[0].max(initial=0))
                part = {name: np.ascontiguousarray(array[rows, :width]) for name, array in arrays.items()}
                self._queue.start_async(part, (hidden, rows, width))
            self._queue.wait_all()
        return BaseModelOutput(last_hidden_state=cast(torch.FloatTensor, torch.from_numpy(hidden)))


def _keep(found: np.ndarray, hidden: np.ndarray, rows: slice, width: int) -> None:
    hidden[rows, :width] = found


def run_with_openvino(model: "SentenceTransformer") -> None:
    """Let OpenVINO run the transformer of a sentence-transformers model from now on.

    Raises:
        ValueError: the model has no transformer, as one of static embeddings.
    """
    transformer = getattr(model[0], "auto_model", None)
    if not isinstance(transformer, PreTrainedModel):
        raise ValueError(f"OpenVINO runs transformers, and this model begins with {type(model[0]).__name__}")
    example = dict(model.tokenizer(EXAMPLE, padding=True, return_tensors="pt"))
    transformer.forward = OpenVinoEncoder(transformer, example)
