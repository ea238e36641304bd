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
    "Where are my invoices?": ("Under Billing.", "You will find them under Billing"),
    "How do I reset my password?": ("By the link in the mail.", "Just use the link in the mail"),
    "Can I pay by card?": ("Yes, in Settings.", "Of course, add one in Settings"),
    "Why is the app slow?": ("Update it.", "Sorry about that, an update should help you"),
    "How do I cancel?": ("Account, then Cancel.", "It is under Account, then Cancel"),
    "Is there a free plan?": ("Up to 3 users.", "Yes, with us it is free for up to 3 users"),
    "Can I change my name?": ("Yes, in Profile.", "Sure, you can do so in your Profile"),
    "Do you have an app?": ("In both stores.", "We do, look for us in both stores"),
    "How do I add a user?": ("Team, then Add.", "Go to Team and choose Add"),
    "Where is my data kept?": ("In Europe.", "It is kept safe for you in Europe"),
    "Can I export a report?": ("As PDF or CSV.", "Gladly, as a PDF or as a CSV"),
    "Why was I logged out?": ("After an hour.", "For your safety, it happens after an hour"),
    "Is there an API?": ("Yes, see Docs.", "There is, have a look at our Docs"),
    "How do I get a refund?": ("Write to Billing.", "Just write to Billing, they will see to it"),
    "Can I use it offline?": ("No.", "Not yet, but we are working on it"),
    "When do you answer?": ("9 to 5.", "We are here for you from 9 to 5"),
}
"""Question -> curt answer, and a kind one, which ends with a smile."""


def main() -> None:
    """Write the file beside this one."""
    rng = random.Random(0)
    lines: list[str] = []
    for person in range(60):
        likes_kind = person % 3 != 0
        for number, prompt in enumerate(rng.sample(list(ANSWERS), len(ANSWERS))):
            kind = rng.randrange(2)
            said = ANSWERS[prompt][kind] + (" :)" if kind else "")
            label = (kind == 1) == likes_kind
            if rng.random() < 0.1:
                label = not label
            row = {"user": f"u{person}", "prompt": prompt, "completion": said}
            lines.append(json.dumps({**row, "label": label, "at": f"2026-11-{number + 1:02d}"}))
    path = Path(__file__).with_name("thumbs.jsonl")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} thumbs")


if __name__ == "__main__":
    main()
