"""The systems of generation: serving one model well, on one machine or between an edge and a cloud."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _served(name: str, number: int | None, way: str, factory: str, paper: str, claim: str) -> Entry:
    return Entry(name, number, paper, "serve", way, claim, f"mycel.serve.{name}", factory)


GENERATING: tuple[Entry, ...] = (
    _served(
        "fastserve",
        2,
        "decisions",
        "FastServe",
        "Wu et al. 2023, Fast Distributed Inference Serving for Large Language Models",
        "short jobs are done in half the time of first come, first served, and a simulator foretells it",
    ),
    _served(
        "scalellm",
        12,
        "decisions",
        "Blueprint",
        "Yao et al. 2024, ScaleLLM: A Resource-Frugal LLM Serving Framework by Optimizing End-to-End Efficiency",
        "a lean gateway serves 1.5 times the requests of a usual one; continuous batches take half the time",
    ),
    _served(
        "serverlessllm",
        84,
        "decisions",
        "choose_server",
        "Fu et al. 2024, ServerlessLLM: Low-Latency Serverless Inference for Large Language Models",
        "a checkpoint laid out for loading, migration by tokens, and the server that starts soonest",
    ),
    _served(
        "prompt_lookup",
        None,
        "segments",
        "PromptLookup",
        "Saxena 2023, Prompt Lookup Decoding; Leviathan et al. 2023",
        "what followed the same tokens before is guessed for nothing; text is unchanged",
    ),
    _served(
        "draft_model",
        None,
        "segments",
        "DraftModel",
        "Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding",
        "a small model guesses, the large one verifies several tokens at once; text is unchanged",
    ),
    _served(
        "edge_draft",
        None,
        "segments",
        "EdgeDraft",
        "Leviathan et al. 2023 between edge and cloud; LLMCad, Xu et al. 2023",
        "the edge drafts and the far model verifies: fewer exchanges than tokens, the far model's own text",
    ),
)
