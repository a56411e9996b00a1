"""All that a training run, an evaluation and a comparison may print.

A line that fits no pattern here is noise, or its pattern is to be added.
"""

import re

# A progress bar, drawn again and again, and the blanks that take it away.
BAR = r".*(\d+%\|.*\||\b\d+it \[).*"
STDERR = (
    BAR,
    r"loading needs [\d.]+ GB \(\d+ x [\d.]+\), and [\d.]+ GB of page cache; "
    r"[\d.]+ GB are available",
    r"resumed \S+ at update \d+ of \d+",
    r"saved \S+/checkpoints/update-\d+: [\d.]+ [MG]B in [\d.]+ s",
    r"warning: pointing game: \d+ of \d+ grids of .*",
    r"warning: training.warmup_epochs .* is used, the same share as in .*",
)
STDOUT = (
    r"run +top-1 .*",
    r"\S+ +(0\.\d+|1\.0+) +.*",
    r"Localisation: mean share in the right cell of \dx\d grids, chance \d.\d+\.",
    r"Pictures:",
    r"  \S+\.(png|html)",
    r"Next:",
    r"  \S*coda (explain|serve|sync).*",
    r"      \w.*",
    r" +http://127.0.0.1:5000/#/\S+",
)


def noise(text: str, patterns: tuple[str, ...]) -> list[str]:
    """Lines of ``text`` that fit none of ``patterns``, or come twice and are not a bar."""
    lines = [line for line in re.split(r"[\r\n]", text) if line.strip()]
    unknown = [
        line for line in lines if not any(re.fullmatch(pattern, line) for pattern in patterns)
    ]
    said = [line for line in lines if not re.fullmatch(BAR, line)]
    return unknown + [line for line in dict.fromkeys(said) if said.count(line) > 1]
