"""Sharing a model: its code is saved beside its weights, and a model card goes to the hub."""

import sys
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from configuration_retro import RetroConfig

from .loading import is_added
from .model_card import TAGS, model_card
from .readers import upload_reader, write_reader

AUTO_CLASSES = {
    "AutoConfig": "configuration_retro.RetroConfig",
    "AutoModel": "modeling_retro.RetroModel",
    "AutoModelForCausalLM": "modeling_retro.RetroForCausalLM",
}


class SharingMixin(PreTrainedModel):
    """`save_pretrained` and `push_to_hub` of RETRO models. They never write a retriever."""

    config: RetroConfig
    evaluation: dict[str, float] | None = None  # held-out measurements, for the model card

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, is_main_process: bool = True, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, with the code that opens the model.

        Parameters are saved under their present names, unless `save_original_format` asks for those
        of the checkpoint that the model was opened from.
        """
        self.config.auto_map = AUTO_CLASSES
        if is_main_process:
            write_code(self, save_directory)
        super().save_pretrained(
            save_directory, is_main_process=is_main_process, save_original_format=save_original_format, **kwargs
        )

    def model_card(self, repo_id: str, is_reader: bool = False) -> ModelCard:
        """Return the card that `push_to_hub` writes (see [`model_card.model_card`])."""
        describe = getattr(self.retriever, "describe", dict)  # without a retriever there is nothing to describe
        return model_card(self.config, repo_id, describe(), self.evaluation, is_reader)

    def save_reader(
        self,
        save_directory: str | Path,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Save what RETRO adds, without the decoder, which is named if it is on the hub.

        `from_pretrained(decoder, reader=save_directory)` puts it on that decoder. It stands for the
        whole model if the decoder was frozen in training (`freeze_backbone`).

        Args:
            push_to_hub: upload the folder as well.
            repo_id: the repository's name on the hub. Default: the folder's.
            private: a new repository is private. Default: as the account's settings say.
            token: of the hub. Default: the stored one.
        """
        repo_id = repo_id or Path(save_directory).name
        weights = {name: tensor for name, tensor in self.state_dict().items() if is_added(name)}
        write_reader(save_directory, self.config, weights, str(self.model_card(repo_id, is_reader=True)))
        if push_to_hub:
            upload_reader(save_directory, repo_id, private, token)

    def _upload_modified_files(  # type: ignore[override]
        self, working_dir: Any, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        # where push_to_hub() and save_pretrained(push_to_hub=True) meet
        readme = Path(working_dir, "README.md")
        if not readme.exists() or not set(TAGS) <= set(ModelCard.load(readme).data.tags or []):  # not one of ours
            self.model_card(repo_id).save(readme)
        ours = {readme.name, *(source.name for source in code_files(self))}
        files_timestamps = {name: time for name, time in files_timestamps.items() if name not in ours}
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)


def write_code(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model's code into a folder, for `trust_remote_code=True`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for source in code_files(model):
        code = source.read_text(encoding="utf-8")
        # in the shared folder, the packages of this project are modules side by side
        code = code.replace("from configuration_retro import", "from .configuration_retro import")
        Path(folder, source.name).write_text(code, encoding="utf-8")


def code_files(model: PreTrainedModel) -> list[Path]:
    """Return the modules that define a model, with all project modules that they import."""
    modeling = str(Path(__file__).with_name("modeling_retro.py"))
    configuration = str(sys.modules[type(model.config).__module__].__file__)
    imported = {file for module in (modeling, configuration) for file in get_relative_import_files(module)}
    return [Path(file) for file in sorted({modeling, configuration, *imported})]
