"""The errors of a knowledge base. Their text is for people: what happened, where, what to do."""


class KnowledgeBaseError(RuntimeError):
    """A knowledge base cannot do what was asked: missing, empty, in use, out of reach, damaged."""


class IdentityMismatch(KnowledgeBaseError):
    """A knowledge base was built with another tokenizer, embedding model or chunk size than the caller's."""
