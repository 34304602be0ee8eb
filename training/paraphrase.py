"""Questions said in other words: words dropped, moved, or replaced by others for the same thing."""

from __future__ import annotations

import random
import re

# Of each line any may stand for any other.
_SAME = """
function|method|routine
list|array|sequence
delete|remove|erase|get rid of
create|make|build|set up
change|modify|alter|edit
show|display|print
use|work with|employ
find|locate|look up
get|obtain|retrieve|fetch
run|execute|start|launch
error|failure|problem
file|document
directory|folder
install|set up
configure|set up|adjust
allow|permit|let
prevent|stop|avoid|keep from
fix|solve|repair|resolve
send|transmit
convert|turn|transform|translate
check|test|verify|make sure
add|insert|append|put in
write|author|produce
speed up|make faster|accelerate
slow|sluggish|taking long
different|distinct|unlike
difference|distinction
between|among
need|require|have to have
want|would like
string|text
variable|name
value|content
specify|give|define|set
disable|turn off|switch off
enable|turn on|switch on|activate
connect|attach|hook up
copy|duplicate|clone
read|load|parse
save|store|keep
support|handle|deal with
update|upgrade|refresh
choose|pick|select
combine|merge|join
split|break up|divide
multiple|several|many|more than one
command|program
option|setting|flag|switch
limit|restrict|cap
increase|raise|enlarge
reduce|lower|decrease|cut down
ignore|skip|leave out
user|person|account
message|mail|note
quit|exit|end|leave
large|big|huge
small|little|tiny
fast|quick
machine|computer|system|host
website|site|web page
happen|occur|take place
wrong|incorrect|bad
cause|lead to|provoke
explain|describe
automatically|by itself|on its own
example|sample
called|named
access|reach|get at
customize|adapt|tailor
manage|administer|look after
debug|troubleshoot|find faults in
return|give back
query|search|request
sort|order|arrange
possible|feasible
best|right|recommended
instead of|rather than
without|not using
mean|stand for|signify
why|for what reason|how come
"""
_OPENINGS = {
    r"how (do|can|would|should) (i|you|one|we) ": (
        "how to ", "what is the way to ", "is there a way to ", "i want to ", "steps to ", "",
        "best way to ", "can I ", "I need to ", "what do I need to do to ",
    ),
    r"how to ": ("how do I ", "how can one ", "what is the way to ", "", "a way to "),
    r"what (is|are) (the )?": ("explain ", "meaning of ", "tell me about ", ""),
    r"why (does|do|is|are|did) ": ("what is the reason that ", "how come ", "reason "),
    r"(can|could) (i|you|one|we) ": ("is it possible to ", "how to ", "is there a way to "),
    r"(is|are) (there|it) ": ("do we have ", "does there exist ", ""),
    r"(does|do) ": ("", "is it so that ", "will "),
    r"(where|when|which|who) ": ("", "tell me where ", "do you know "),
}  # fmt: skip
_SMALL_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the to of in on for with by at from and or is are was be do does did i you my your "
        "it its this that can could should would will there have has when how what why which who "
        "not",
    )
)
_CLAUSE_STARTS = frozenset(re.findall(r"\w+", "in with from when for on using if after without"))


def _others() -> dict[str, list[str]]:
    others: dict[str, list[str]] = {}
    for line in _SAME.strip().splitlines():
        words = line.split("|")
        for word in words:
            others.setdefault(word, []).extend(other for other in words if other != word)
    return others


_OTHERS = _others()


def paraphrase(question: str, generator: random.Random) -> str:
    """Say a question in other words, by rules alone: the outcome need not be good English.

    Args:
        question: A question or heading.
        generator: Source of chance.

    Returns:
        The question in other words, which may happen to be the same ones.
    """
    said = question.strip().rstrip("?. ")
    said = said[:1].lower() + said[1:]
    if generator.random() < 0.75:
        for opening, openings in _OPENINGS.items():
            if found := re.match(opening, said, re.IGNORECASE):
                said = generator.choice(openings) + said[found.end() :]
                break
    for phrase in (one for one in _OTHERS if " " in one and one in said):
        if generator.random() < 0.6:
            said = said.replace(phrase, generator.choice(_OTHERS[phrase]), 1)
    words = _moved(_reworded(said.split(), generator), generator)
    said = " ".join(words) or question
    if generator.random() < 0.4:
        said += "?"
    return said.lower() if generator.random() < 0.4 else said[:1].upper() + said[1:]


def _reworded(words: list[str], generator: random.Random) -> list[str]:
    replaced = generator.choice((0.3, 0.6, 0.8))
    dropped = generator.choice((0.0, 0.1, 0.25))
    kept = []
    for word in words:
        core = word.strip(",.;:()\"'").lower()
        stems = [core, core.removesuffix("s"), core.removesuffix("ing")]
        stem = next((stem for stem in stems if stem in _OTHERS), None)
        if stem is not None and generator.random() < replaced:
            kept.append(generator.choice(_OTHERS[stem]))
        elif generator.random() < (3 * dropped if core in _SMALL_WORDS else dropped / 2):
            continue
        else:
            kept.append(word)
    return kept


def _moved(words: list[str], generator: random.Random) -> list[str]:
    chance = generator.random()
    cuts = [place for place, word in enumerate(words) if word.lower() in _CLAUSE_STARTS]
    if chance < 0.3 and len(words) > 5 and cuts:
        cut = generator.choice(cuts)  # a clause goes to the front
    elif 0.3 <= chance < 0.4 and words:
        cut = generator.randrange(len(words))
    else:
        cut = 0
    return words[cut:] + words[:cut]
