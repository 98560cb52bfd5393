"""The errors of a knowledge base. Their messages say what happened, where, and what to do."""


class KnowledgeBaseError(RuntimeError):
    """A knowledge base is missing, empty, in use, out of reach or damaged."""


class IdentityMismatch(KnowledgeBaseError):
    """A knowledge base has another tokenizer, embedding model or chunk size than the caller."""
