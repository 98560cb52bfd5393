"""Names of tokenizers and embedding models, without paths of a machine."""


def short_name(name_or_folder: str) -> str:
    """Return the last two parts of a hub name or a folder: "owner/name"."""
    parts = [part for part in str(name_or_folder).replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(parts[-2:])
