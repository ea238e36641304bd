"""Write thumbs.jsonl, a log of a made-up product: whose answers do people give a thumb up?

    python examples/thumbs.py && pgrpo train examples/thumbs.toml

Sixty people ask a help desk, which answers curtly or kindly. Every third person likes curt answers, the
others kind ones, and one thumb in ten goes the other way.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

ANSWERS = {
    "Where are my invoices?": (
        "Under Billing.",
        "Happy to help! You will find them under Billing :)",
    ),
    "How do I reset my password?": (
        "Use the link in the mail.",
        "No worries at all! Just use the link in the mail :)",
    ),
    "Can I pay by card?": (
        "Yes, in Settings.",
        "Of course you can! Just add it in Settings :)",
    ),
    "Why is the app slow?": (
        "Update it.",
        "Oh, sorry about that! An update should help you :)",
    ),
    "How do I cancel?": (
        "Account, then Cancel.",
        "Sad to see you go! It is under Account, then Cancel :)",
    ),
    "Is there a free plan?": (
        "Yes, up to 3 users.",
        "Great question! Yes, for up to 3 users :)",
    ),
}
"""Question -> curt answer, kind answer."""


def main() -> None:
    """Write the file beside this one."""
    rng = random.Random(0)
    lines: list[str] = []
    for person in range(60):
        likes_kind = person % 3 != 0
        for number in range(16):
            prompt = rng.choice(list(ANSWERS))
            kind = rng.randrange(2)
            label = (kind == 1) == likes_kind
            if rng.random() < 0.1:
                label = not label
            row = {"user": f"u{person}", "prompt": prompt, "completion": ANSWERS[prompt][kind]}
            lines.append(json.dumps({**row, "label": label, "at": f"2026-11-{number + 1:02d}"}))
    path = Path(__file__).with_name("thumbs.jsonl")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} thumbs")


if __name__ == "__main__":
    main()
