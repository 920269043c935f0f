"""Systems that tune a model in rounds, as data."""

from __future__ import annotations

from mycel.catalog.entry import Entry


def _tuned(
    name: str, number: int | None, file: str, factory: str, paper: str, claim: str, measure: str = "claim"
) -> Entry:
    return Entry(name, number, paper, "finetune", "rounds", claim, f"mycel.finetune.{file}", factory, measure)


_OPENFEDLLM = (
    "Ye et al. 2024, OpenFedLLM: Training Large Language Models on Decentralized Private Data via Federated Learning"
)

TUNING: tuple[Entry, ...] = (
    _tuned("fedavg", 21, "fedavg", "FedAvg", _OPENFEDLLM, "federated tuning beats every party's tuning alone"),
    _tuned(
        "local",
        None,
        "local",
        "Local",
        "baseline: each party alone",
        "after one round, FedAvg is the mean of what parties learn alone",
    ),
    _tuned(
        "fedpt",
        61,
        "fedpt",
        "FedPT",
        "Gao et al. 2024, FedPT: Federated Proxy-Tuning of Large Language Models on Resource-Constrained Edge Devices",
        "a large model nobody tunes answers nearly as if tuned, at the small model's traffic",
    ),
    _tuned(
        "fedlora_t5",
        86,
        "fedavg_t5",
        "FedAvgT5",
        "thesis on federated LoRA of T5 for summaries (known from reviews)",
        "close to centralised LoRA, while only A and B travel",
    ),
    _tuned(
        "fedkseed",
        8,
        "fedkseed",
        "FedKSeed",
        "Qin et al. 2024, Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost "
        "under 18 Kilobytes",
        "all weights are tuned for less than 18 KB per party and round, whatever the model's size",
    ),
    _tuned(
        "fedkseed_pro",
        8,
        "fedkseed_pro",
        "FedKSeedPro",
        "Qin et al. 2024, Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost "
        "under 18 Kilobytes",
        "drawing steep seeds more often reaches a loss in no more steps than drawing all alike",
    ),
    _tuned(
        "fedmezo",
        17,
        "fedmezo",
        "FedMeZO",
        "Ling et al. 2024, On the Convergence of Zeroth-Order Federated Tuning for Large Language Models",
        "at equal learning rates the loss falls faster than with first-order FedAvg, in the memory of inference",
    ),
    _tuned(
        "ferret",
        20,
        "ferret",
        "Ferret",
        "Shu et al. 2024, Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models",
        "first-order changes travel as shared-randomness coordinates and need far fewer rounds than FedKSeed",
    ),
    _tuned(
        "fedcybgd",
        35,
        "fedcybgd",
        "FedCyBGD",
        "Wang et al. 2024, Save It All: Enabling Full Parameter Tuning for Federated Large Language Models via "
        "Cycle Block Gradient Descent",
        "full-parameter quality while a party trains and sends one block of the model at a time",
    ),
    _tuned("fedprox", 21, "fedprox", "FedProx", _OPENFEDLLM, "a proximal term keeps unlike parties closer together"),
    _tuned("scaffold", 21, "scaffold", "Scaffold", _OPENFEDLLM, "control variates lessen the drift of unlike parties"),
    _tuned(
        "fedavgm",
        21,
        "fedopt",
        "FedAvgM",
        _OPENFEDLLM,
        "server momentum steadies rounds of few, unlike parties, and beats tuning alone",
        "claim_momentum",
    ),
    _tuned(
        "fedadagrad",
        21,
        "fedopt",
        "FedAdagrad",
        _OPENFEDLLM,
        "an adaptive server that only ever shortens its steps beats tuning alone",
        "claim_adagrad",
    ),
    _tuned(
        "fedyogi",
        21,
        "fedopt",
        "FedYogi",
        _OPENFEDLLM,
        "an adaptive server that forgets slowly beats tuning alone",
        "claim_yogi",
    ),
    _tuned(
        "fedadam",
        21,
        "fedopt",
        "FedAdam",
        _OPENFEDLLM,
        "an adaptive server depends less on the step that parties take at home, and beats tuning alone",
        "claim_adam",
    ),
    _tuned(
        "fedbuff",
        None,
        "fedbuff",
        "FedBuff",
        "Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation",
        "a target loss is reached up to 3.3 times sooner than in synchronous rounds",
    ),
    _tuned(
        "mira",
        65,
        "mira",
        "Mira",
        "Elbakary et al. 2025, MIRA: A Method of Federated Multi-Task Learning for Large Language Models",
        "tied states have a lower mean local loss than one state for all and than states on their own",
    ),
    _tuned(
        "ffa_lora",
        94,
        "ffa_lora",
        "FfaLora",
        "Sun et al. 2024, Improving LoRA in Privacy-preserving Federated Learning",
        "a frozen A halves the upload and makes the average exact and noise linear",
    ),
    _tuned(
        "flexlora",
        95,
        "flexlora",
        "FlexLora",
        "Bai et al. 2024, Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
        "Resources",
        "parties of high rank are not held back by those of low rank",
    ),
    _tuned(
        "flora_stacking",
        97,
        "flora_stacking",
        "FloraStacking",
        "Wang et al. 2024, FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
        "stacked adapters of any ranks add up without error and beat averages padded with zeros",
    ),
    _tuned(
        "flasc",
        89,
        "flasc",
        "Flasc",
        "Kuo et al. 2024, Federated LoRA with Sparse Communication",
        "dense LoRA's quality with up to ten times less communication, better than LoRA of a lower rank",
    ),
    _tuned(
        "lora_a2",
        49,
        "lora_a2",
        "LoraA2",
        "Koo et al. 2024, Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients",
        "at rank 1 and 2 it stays near full tuning where plain LoRA and FFA-LoRA fall behind, with 99.8 % less upload",
    ),
    _tuned(
        "masked_lora",
        None,
        "masked_lora",
        "MaskedLora",
        "composition: federated LoRA, 8-bit fixed point, SecAgg+ (Bell et al. 2020), parties that leave",
        "a masked sum of 8-bit adapters equals the plain fixed-point sum bit for bit with 30 % leaving mid-round",
    ),
    _tuned(
        "masked_flora",
        None,
        "masked_flora",
        "MaskedFlora",
        "composition: FLoRA (Wang et al. 2024), 8-bit fixed point, SecAgg+ (Bell et al. 2020), parties that leave",
        "a masked sum of adapters' products equals the plain one bit for bit, at unlike ranks, with 30 % leaving",
    ),
    _tuned(
        "safety_attack",
        23,
        "safety_attack",
        "SafetyAttack",
        "Ye et al. 2024, Emerging Safety Attack and Defense in Federated Instruction Tuning of Large Language Models",
        "unsafe examples of few parties break refusing, filters bring back little, tuning at the server most of it",
    ),
    _tuned(
        "fewfedpit",
        27,
        "fewfedpit",
        "FewFedPit",
        "Zhang et al. 2024, FedPIT: Towards Privacy-preserving and Few-shot Federated Instruction Tuning",
        "mixing in parameters trained on invented examples lowers extraction and helps parties with few examples",
    ),
    _tuned(
        "rehearsal",
        91,
        "rehearsal",
        "Rehearsal",
        "Popov et al. 2018, Distributed Fine-tuning of Language Models on Private Data",
        "private perplexity falls much while general perplexity stays, which without rehearsal it does not",
    ),
    _tuned(
        "private_ffa_lora",
        94,
        "private_ffa_lora",
        "PrivateFfaLora",
        "Sun et al. 2024, Improving LoRA in Privacy-preserving Federated Learning",
        "under example-level privacy, freezing A loses less than training both factors at the same epsilon",
    ),
    _tuned(
        "enclave_sparse",
        28,
        "enclave_sparse",
        "EnclaveSparse",
        "Huang et al. 2024, Secure Distributed Training of Large Language Models",
        "one-time pads keep untrusted machines blind at no loss, and chosen rows train better than LoRA alone",
    ),
)
