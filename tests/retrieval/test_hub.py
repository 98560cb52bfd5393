"""A knowledge base on the hub: a push and an import give the same knowledge base elsewhere."""

import subprocess
import sys

from retrieval import MilvusStore, export_knowledge_base, import_knowledge_base, ingest

from ..support.hub import Hub
from ..support.places import CHUNK, rows_of

PUSH = "import sys; from retrieval import push_knowledge_base; push_knowledge_base(sys.argv[1], 'owner/knowledge')"


def test_a_pushed_export_is_imported_elsewhere(tmp_path, documents, tokenizer, embedder):
    store = MilvusStore(str(tmp_path / "kb.db"), "retro")
    ingest(documents, store, tokenizer, embedder, chunk_size=CHUNK)
    export_knowledge_base(store, tmp_path / "export", tokenizer)
    with Hub() as hub:
        environment = hub.environment(tmp_path / "hf") | {"HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "export")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr[-2000:]
    files = hub.files["owner/knowledge"]
    for name, content in files.items():
        assert content == (tmp_path / "export" / name).read_bytes() and b"hf_secret" not in content
    hub.write("owner/knowledge", tmp_path / "pulled")
    elsewhere = MilvusStore(str(tmp_path / "elsewhere.db"), "retro")
    assert import_knowledge_base(str(tmp_path / "pulled"), elsewhere) == store.count()
    assert rows_of(elsewhere) == rows_of(store)
    store.close()
    elsewhere.close()
