"""
Make the embedded model and its data from nothing but the code below: under an hour on 2 CPU cores.

In order: a small world (lists of facts), tasks over it, instruction records of them with verified
answers, a byte-level BPE vocabulary in GPT-2's file format, plain text about the same world, and a
small GPT-2 pretrained on that text. What it writes, next to itself or to --out:

    instructions.json          instruction, input, output, task, level, instruction_long (a paraphrase),
                               rationale (a worked solution), draft (the answer with one error)
    heldout.txt                text of the same world, never trained on: to measure forgetting
    model/vocab.json           2,048 tokens: 256 bytes, merges.txt's pairs, <|endoftext|> as the last;
    model/merges.txt           digits are never merged
    model/config.json          4 layers, width 192
    model/model.safetensors    half precision

The plain text holds every fact and every answer's sentence, but no prompt template. The records of the
test part ask for facts that no record of another part asks for. Everything is drawn from --seed.

    python tiny/make.py
    python tiny/make.py --only instructions heldout
    python tiny/make.py --layers 8 --out runs/eight       # a deeper model, of the same text
"""

import argparse
import collections
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import load_tokenizer
from gpt import GPT, GPTConfig

HERE = Path(__file__).resolve().parent
PARTS = {"train": 255, "test": 30, "val": 15}  # records of each task, in file order: 85/10/5

# ---- The world ------------------------------------------------------------------------------------


def pairs(text):
    """'a b, c d e' -> [('a', 'b'), ('c', 'd e')]."""
    return [tuple(entry.strip().split(" ", 1)) for entry in text.split(",")]


# country=capital, the better known first
CAPITALS = dict(entry.strip().split("=") for entry in """
    France=Paris, Germany=Berlin, Spain=Madrid, Italy=Rome, Japan=Tokyo, China=Beijing, Russia=Moscow,
    Egypt=Cairo, Greece=Athens, Ireland=Dublin, Portugal=Lisbon, Austria=Vienna, Belgium=Brussels,
    Poland=Warsaw, Norway=Oslo, Sweden=Stockholm, Denmark=Copenhagen, Finland=Helsinki, Canada=Ottawa,
    Mexico=Mexico City, Cuba=Havana, Peru=Lima, Chile=Santiago, Argentina=Buenos Aires, Brazil=Brasilia,
    India=New Delhi, Turkey=Ankara, Iran=Tehran, Iraq=Baghdad, Thailand=Bangkok, Australia=Canberra,
    New Zealand=Wellington, Hungary=Budapest, Switzerland=Bern, Kenya=Nairobi, Ukraine=Kyiv,
    Vietnam=Hanoi, Iceland=Reykjavik, Colombia=Bogota, Romania=Bucharest, Bulgaria=Sofia,
    Croatia=Zagreb, Serbia=Belgrade, Slovakia=Bratislava, Latvia=Riga, Lithuania=Vilnius,
    Estonia=Tallinn, Albania=Tirana, Slovenia=Ljubljana, Malta=Valletta, Cyprus=Nicosia, Morocco=Rabat,
    Algeria=Algiers, Tunisia=Tunis, Libya=Tripoli, Sudan=Khartoum, Ethiopia=Addis Ababa, Uganda=Kampala,
    Ghana=Accra, Nigeria=Abuja, Senegal=Dakar, Syria=Damascus, Lebanon=Beirut, Jordan=Amman, Qatar=Doha,
    Oman=Muscat, Pakistan=Islamabad, Afghanistan=Kabul, Nepal=Kathmandu, Bangladesh=Dhaka,
    Malaysia=Kuala Lumpur, Jamaica=Kingston, Ecuador=Quito, Uruguay=Montevideo, Venezuela=Caracas,
    Paraguay=Asuncion, Panama=Panama City, Nicaragua=Managua, Armenia=Yerevan, Georgia=Tbilisi,
    Azerbaijan=Baku, Uzbekistan=Tashkent, Mongolia=Ulaanbaatar, Laos=Vientiane, Cambodia=Phnom Penh,
    Fiji=Suva, Mali=Bamako, Niger=Niamey, Rwanda=Kigali, Angola=Luanda, Zambia=Lusaka, Zimbabwe=Harare,
    Namibia=Windhoek, Somalia=Mogadishu, Mozambique=Maputo, Madagascar=Antananarivo, Bhutan=Thimphu,
    Guyana=Georgetown, Belize=Belmopan, Bahrain=Manama
""".split(","))

PLURALS = pairs("""
    cat cats, dog dogs, book books, car cars, tree trees, house houses, girl girls, boy boys, cup cups,
    hat hats, door doors, table tables, chair chairs, apple apples, bird birds, horse horses, cow cows,
    king kings, ring rings, ship ships, road roads, river rivers, cloud clouds, stone stones,
    flower flowers, window windows, garden gardens, school schools, teacher teachers, letter letters,
    day days, key keys, toy toys, monkey monkeys, box boxes, fox foxes, bus buses, dress dresses,
    glass glasses, class classes, dish dishes, brush brushes, bush bushes, wish wishes, church churches,
    beach beaches, bench benches, watch watches, match matches, peach peaches, witch witches,
    kiss kisses, tax taxes, city cities, baby babies, lady ladies, party parties, story stories,
    berry berries, cherry cherries, country countries, family families, puppy puppies, pony ponies,
    penny pennies, army armies, duty duties, body bodies, copy copies, fly flies, leaf leaves,
    wolf wolves, knife knives, wife wives, life lives, shelf shelves, half halves, loaf loaves,
    thief thieves, calf calves, potato potatoes, tomato tomatoes, hero heroes, echo echoes,
    child children, man men, woman women, foot feet, tooth teeth, goose geese, mouse mice, ox oxen,
    louse lice, sheep sheep, deer deer, fish fish, person people
""")

PASTS = pairs("""
    walk walked, talk talked, play played, jump jumped, look looked, help helped, open opened,
    ask asked, call called, wash washed, paint painted, clean cleaned, watch watched, push pushed,
    pull pulled, laugh laughed, cook cooked, listen listened, smile smiled, bake baked, move moved,
    live lived, love loved, dance danced, close closed, use used, carry carried, cry cried, try tried,
    study studied, hurry hurried, worry worried, stop stopped, plan planned, drop dropped, shop shopped,
    hug hugged, clap clapped, beg begged, go went, come came, see saw, eat ate, drink drank, sing sang,
    swim swam, run ran, sit sat, give gave, take took, make made, say said, tell told, sell sold,
    buy bought, bring brought, think thought, catch caught, teach taught, fight fought, write wrote,
    ride rode, drive drove, rise rose, speak spoke, break broke, wake woke, choose chose, steal stole,
    know knew, grow grew, throw threw, blow blew, draw drew, fall fell, feel felt, keep kept,
    sleep slept, leave left, meet met, lead led, feed fed, read read, find found, hold held,
    stand stood, build built, send sent, spend spent, lend lent, lose lost, shoot shot, win won,
    begin began, ring rang, sink sank, hear heard, wear wore, tear tore, forget forgot, hide hid,
    bite bit, shake shook, cut cut, put put, hit hit, shut shut, hurt hurt, have had, do did
""")

OPPOSITES = pairs("""
    hot cold, big small, tall short, fast slow, old young, happy sad, good bad, rich poor, hard soft,
    heavy light, strong weak, full empty, wet dry, clean dirty, early late, high low, near far,
    thick thin, wide narrow, loud quiet, open closed, left right, up down, in out, day night,
    black white, first last, front back, top bottom, inside outside, above below, before after,
    always never, push pull, give take, buy sell, start stop, win lose, love hate, laugh cry,
    remember forget, come go, rise fall, question answer, friend enemy, war peace, summer winter,
    north south, east west, heaven hell, king queen, brother sister, father mother, son daughter,
    husband wife, uncle aunt, man woman, boy girl, true false, safe dangerous, easy difficult,
    cheap expensive, sweet sour, smooth rough, sharp blunt, brave afraid, polite rude, simple complex,
    deep shallow, bright dark, tight loose, alive dead, asleep awake, present absent, same different,
    many few, more less, better worse, beginning end, success failure, truth lie, victory defeat,
    noise silence, enter leave, arrive depart, save spend, ancient modern, public private,
    straight crooked, guilty innocent, lazy busy, proud humble, kind cruel, wise foolish
""")

CATEGORIES = {kind.strip(): members.split() for kind, members in (entry.split(":") for entry in """
    bird: robin eagle sparrow owl crow swan parrot penguin pigeon hawk; fish: salmon trout shark tuna
    carp herring cod; insect: ant bee wasp beetle moth mosquito cricket; tree: oak pine maple willow
    birch elm cedar palm; flower: rose tulip daisy lily violet orchid sunflower poppy; fruit: apple
    banana pear grape mango plum peach lemon cherry; vegetable: carrot onion cabbage potato turnip bean
    pea radish; tool: hammer saw drill wrench shovel axe rake chisel; instrument: piano violin flute
    drum guitar trumpet harp cello; vehicle: car bus truck train bicycle tractor van taxi; building:
    church castle hotel barn cottage palace temple factory; reptile: snake lizard turtle crocodile
""".split(";"))}
KIND = {member: kind for kind, members in CATEGORIES.items() for member in members}

# larger unit, smaller unit, how many of the smaller make one of the larger
UNITS = [(a, b, int(n)) for a, b, n in (entry.split() for entry in """
    weeks days 7, days hours 24, hours minutes 60, minutes seconds 60, years months 12,
    meters centimeters 100, kilometers meters 1000, kilograms grams 1000, feet inches 12, yards feet 3,
    pounds ounces 16, dollars cents 100
""".split(","))]

SEQUENCES = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": ("January February March April May June July August September October November "
              "December").split(),
    "letter": list("abcdefghijklmnopqrstuvwxyz"),
    "number": [str(n) for n in range(1, 41)],
}

# from the smallest to the largest
ANIMALS = ("ant bee mouse rat frog crow duck cat fox goat sheep wolf lion pig bear cow horse elephant "
           "whale").split()

NAMES = "Anna Ben Tom Mia Sam Lily Jack Emma Leo Nora Max Ruth Paul Kate".split()
THINGS = "ball cup book hat bag pen box key coin map".split()
COLORS = "red blue green black white yellow brown".split()
MOODS = "happy sad tired hungry thirsty sick young old brave late".split()
SKILLS = "swim sing dance read write cook ride drive draw run".split()
MOMENTS = "today,now,again,at home,at school,in the morning,in the evening,in summer".split(",")
LIKED = "tea milk bread cheese fish music soup rice honey cake".split()
ACTORS = "cat dog horse boy girl king queen farmer teacher doctor cook nurse".split()
ACTIONS = pairs("""
    chased chased, watched watched, helped helped, followed followed, pushed pushed, carried carried,
    washed washed, called called, visited visited, kissed kissed, found found, caught caught, fed fed,
    hit hit, saw seen, bit bitten, drew drawn, took taken, forgot forgotten, knew known
""")
LOOKS = "small big old young tall sad happy brown".split()

# misspelled, right
TYPOS = pairs("""
    freind friend, teecher teacher, hosue house, scool school, watter water, gardin garden,
    animel animal, brothr brother, sistter sister, mothar mother, fathr father, windoe window,
    tabel table, applle apple, breadd bread, flowr flower, moutain mountain, rivver river,
    picturre picture, storry story, kichen kitchen, docter doctor, farmmer farmer, hourse horse,
    chiken chicken, lettr letter, paperr paper, moeny money, musik music, suger sugar, buter butter,
    chese cheese, dinnar dinner, streat street, villige village, ilsand island, wintter winter,
    sumer summer, mornig morning, evning evening
""")
SIGHTS = [
    "We like the {}.", "Anna saw the {} today.", "The {} was very good.", "Tom told us about the {}.",
    "I think of the {} every day.", "Nobody knew the {} as well as Ben did.",
    "This is the {} that we love.", "They never forgot the {}.",
]

# ---- The tasks ------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One task. Every text is a format string over the fields that `draw` returns.

    draw(rng) returns a dict with these fields, and "item" (what must not be in two parts of the data),
    "level" (1-3) and "wrong" (fields to replace in `output`, for the draft).
    check(record, **fields) gets the fields that an answer names in the places of `output`, and says
    from them, the record's instruction and its input alone whether the answer is right.
    """

    draw: Callable
    asks: list  # instructions; the first two are also asked in the plain text
    long: str  # a long paraphrase of them
    output: str
    rationale: str
    check: Callable
    input: str = ""
    tells: tuple = ("{output}",)  # passages of the plain text
    asked: bool = True  # False: told of in the plain text only, because a model of this size answers too few


def a(word):
    """The word with its indefinite article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def upper(text):
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def other(rng, choices, *taken):
    """A choice that is none of those taken."""
    return rng.choice([c for c in choices if c not in taken])


def third(position, n):
    """Level 1, 2 or 3 of a place in a list that goes from easy to hard."""
    return 1 + 3 * position // n


def mentions(record, *words):
    """Whether each of the words stands in the record's instruction or input."""
    prompt = record["instruction"] + " " + record["input"]
    return all(re.search(rf"(?<!\w){re.escape(str(w))}(?!\w)", prompt) for w in words)


def draw_capital(rng):
    """A country; the draft names the capital of another."""
    i = rng.randrange(len(CAPITALS))
    country, capital = list(CAPITALS.items())[i]
    return dict(item=country, level=third(i, len(CAPITALS)), country=country, capital=capital,
                wrong=dict(capital=other(rng, CAPITALS.values(), capital)))


def draw_plural(rng):
    """A noun; the draft has a regular ending that is not its own."""
    i = rng.randrange(len(PLURALS))
    noun, plural = PLURALS[i]
    return dict(item=noun, level=third(i, len(PLURALS)), noun=noun, plural=plural,
                wrong=dict(plural=noun + "s" if plural != noun + "s" else noun + "es"))


def draw_past(rng):
    """A verb; the draft has a regular ending that is not its own."""
    verb, past = rng.choice(PASTS)
    level = 1 if past == verb + "ed" else 2 if past.endswith("ed") else 3
    how = "adds ed" if level == 1 else "changes a little" if level == 2 else "has its own form"
    return dict(item=verb, level=level, verb=verb, past=past, how=how,
                wrong=dict(past=verb + "ed" if past != verb + "ed" else verb + "en"))


def draw_opposite(rng):
    """A word of a pair; the draft names a word of another pair."""
    i = rng.randrange(len(OPPOSITES))
    word, opposite = rng.sample(OPPOSITES[i], 2)
    return dict(item=OPPOSITES[i][0], level=third(i, len(OPPOSITES)), word=word, opposite=opposite,
                wrong=dict(opposite=other(rng, [p[0] for p in OPPOSITES], word, opposite)))


def draw_category(rng):
    """A thing and the kind it is of; the draft names another kind."""
    member = rng.choice(list(KIND))
    kinds = list(CATEGORIES)
    kind = KIND[member]
    return dict(item=member, level=third(kinds.index(kind), len(kinds)), member=member, kind=kind,
                thing=upper(a(member)), thing_=a(member), sibling_=a(other(rng, CATEGORIES[kind], member)),
                wrong=dict(kind=other(rng, kinds, kind)))


def draw_conversion(rng):
    """A number of large units in small ones; the draft has the result of another number."""
    large, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 9)
    level = 1 if factor in (100, 1000) else 2 if factor < 10 else 3
    one = "foot" if large == "feet" else large[:-1]
    return dict(item=f"{n} {large}", level=level, n=n, large=large, small=small, factor=factor, one=one,
                m=n * factor, wrong=dict(m=other(rng, range(2, 10), n) * factor))


def draw_arithmetic(rng):
    """A two-digit number plus or minus one digit; the draft is off by 1 or 10."""
    x, y = rng.randint(10, 90), rng.randint(1, 9)
    sign = rng.choice([1, -1])
    z, tens, ones = x + sign * y, x // 10, x % 10
    carries = not 0 <= ones + sign * y <= 9
    if sign == 1:
        word, move, ones_out = "plus", "go up", ones + y
    else:
        word, move, ones = "minus", "go down", ones + 10 * carries
        ones_out = ones - y
    effect = f"so the tens {move}" if carries else "and the tens stay"
    work = f"{ones} {word} {y} is {ones_out}, {effect}."
    level = 1 + carries + (carries and sign == -1)
    return dict(item=f"{x} {word} {y}", level=level, x=x, y=y, z=z, word=word, work=work, tens=tens,
                wrong=dict(z=z + rng.choice([1, -1, 10])))


def draw_sorting(rng):
    """Three to five numbers below 20; the draft has two neighbors in the wrong order."""
    n = rng.choice([3, 3, 4, 4, 5])
    numbers = rng.sample(range(1, 20), n)
    right = sorted(numbers)
    i = rng.randrange(n - 1)
    swapped = right[:i] + [right[i + 1], right[i]] + right[i + 2:]
    text = ", ".join(map(str, numbers))
    return dict(item=text, level=n - 2, numbers=text, low=right[0], high=right[-1],
                ordered=", ".join(map(str, right)), wrong=dict(ordered=", ".join(map(str, swapped))))


SPELLED = sorted({w for w in [*dict(PLURALS), *dict(PASTS), *KIND] if 3 <= len(w) <= 7})


def draw_word(rng):
    """A word to spell or to count; the drafts swap two letters or are off by one."""
    word = rng.choice(SPELLED)
    i = rng.randrange(len(word) - 1)
    while word[i] == word[i + 1]:
        i = (i + 1) % (len(word) - 1)
    swapped = word[:i] + word[i + 1] + word[i] + word[i + 2:]
    level = 1 if len(word) < 5 else 2 if len(word) < 6 else 3
    return dict(item=word, level=level, word=word, letters=" ".join(word), n=len(word),
                first=word[0], last=word[-1],
                wrong=dict(letters=" ".join(swapped), n=len(word) + rng.choice([1, -1])))


def draw_passive(rng):
    """Someone does something to someone; the draft swaps the two."""
    subject, target = rng.sample(ACTORS, 2)
    past, participle = rng.choice(ACTIONS)
    level = rng.randint(1, 3)
    if level > 1:
        subject = f"{rng.choice(LOOKS)} {subject}"
    if level > 2:
        target = f"{rng.choice(LOOKS)} {target}"
    return dict(item=f"{subject} {past} {target}", level=level, subject=subject, target=target, past=past,
                participle=participle, wrong=dict(subject=target, target=subject))


def draw_typo(rng):
    """A text with one or two misspelled words; the draft leaves one of them."""
    level = rng.randint(1, 3)
    (bad, good), (bad2, good2) = rng.sample(TYPOS, 2)
    sight, sight2 = rng.sample(SIGHTS, 2)
    text, fixed, half = sight.format(bad), sight.format(good), sight.format(bad)
    work = f"The word {bad} should be {good}."
    if level == 2:
        text, fixed, half = (f"{t} {sight2.format(good2)}" for t in (text, fixed, half))
    if level == 3:
        text, half = f"{text} {sight2.format(bad2)}", f"{fixed} {sight2.format(bad2)}"
        fixed = f"{fixed} {sight2.format(good2)}"
        work += f" The word {bad2} should be {good2}."
    return dict(item=text, level=level, text=text, fixed=fixed, work=work, wrong=dict(fixed=half))


def draw_comparison(rng):
    """Two animals or two numbers; the draft says it the wrong way round."""
    relation = rng.choice(["larger", "smaller"])
    if rng.random() < 0.4:
        level, (x, y) = 1, rng.sample(ANIMALS, 2)
        low, high = sorted([x, y], key=ANIMALS.index)
        x, y, low, high = a(x), a(y), a(low), a(high)
    else:
        level, x, y = 2, *rng.sample(range(10, 100), 2)
        if rng.random() < 0.4:
            level, (x, y) = 3, rng.sample(range(10 * (x // 10), 10 * (x // 10) + 10), 2)
        low, high = sorted([x, y])
    work = f"From small to large that is {low}, {high}."
    first, second = (high, low) if relation == "larger" else (low, high)
    return dict(item=" ".join(sorted([str(x), str(y)])), level=level, relation=relation, x=x, y=y,
                work=work, first=upper(str(first)), second=second,
                wrong=dict(first=upper(str(second)), second=first))


def draw_neighbor(rng):
    """What stands after or before in a sequence; the draft looks to the other side."""
    kind = rng.choice(list(SEQUENCES))
    words, side = SEQUENCES[kind], rng.choice([1, -1])
    cyclic = kind in ("day", "month")
    i = rng.randrange(len(words)) if cyclic else rng.randrange(1, len(words) - 1)
    word, answer = words[i], words[(i + side) % len(words)]
    level = dict(day=1, number=1, month=2, letter=3)[kind]
    return dict(item=" ".join(sorted([word, answer])), level=level, kind=kind, word=word, answer=answer,
                side="after" if side == 1 else "before", back="before" if side == 1 else "after",
                wrong=dict(answer=words[(i - side) % len(words)]))


def draw_reading(rng):
    """Two to four things and their owners; the draft names another owner."""
    level = rng.randint(1, 3)
    n = level + 1
    people, things = rng.sample(NAMES, n), rng.sample(THINGS, n)
    facts = [f"{p} has the {rng.choice(COLORS)} {t}." for p, t in zip(people, things)]
    i = rng.randrange(n)
    owner, work = people[i], facts[i]
    text = " ".join(facts)
    return dict(item=f"{text} {things[i]}", level=level, text=text, thing=things[i], owner=owner, work=work,
                wrong=dict(owner=other(rng, people, owner)))


def draw_negation(rng):
    """A statement; the draft has the wrong tense or verb form."""
    name, level, when = rng.choice(NAMES), rng.randint(1, 3), rng.choice(MOMENTS)
    word = rng.choice([MOODS, SKILLS, LIKED][level - 1])
    verbs = [("is", "is not", "was not"), ("can", "cannot", "could not"),
             ("likes", "does not like", "does not likes")]
    text, denied, wrong = (f"{name} {verb} {word} {when}." for verb in verbs[level - 1])
    return dict(item=text, level=level, text=text, denied=denied, wrong=dict(denied=wrong))


# The checkers work back from the texts: none of them sees the fields that a record was made from.


def opposed(word):
    """The word's partner in OPPOSITES, or None."""
    return {**dict(OPPOSITES), **{y: x for x, y in OPPOSITES}}.get(word)


def check_conversion(record, n, large, m, small):
    """Multiply by the factor of the two units."""
    factors = {(u, v): factor for u, v, factor in UNITS}
    return mentions(record, f"{n} {large}", small) and int(m) == int(n) * factors[large, small]


def check_arithmetic(record, x, word, y, z):
    """Compute it."""
    sign = {"plus": 1, "minus": -1}[word]
    return mentions(record, f"{x} {word} {y}") and int(z) == int(x) + sign * int(y)


def check_sorting(record, ordered):
    """Sort the input's numbers."""
    numbers = [int(n) for n in re.findall(r"\d+", record["input"])]
    return ordered == ", ".join(str(n) for n in sorted(numbers))


def check_passive(record, target, participle, subject):
    """Rebuild the active sentence."""
    return any(record["input"] == f"The {subject} {past} the {target}."
               for past, form in ACTIONS if form == participle)


def check_typo(record, fixed):
    """Correct every word of the input."""
    return fixed == re.sub(r"\w+", lambda m: dict(TYPOS).get(m[0], m[0]), record["input"])


def check_comparison(record, first, relation, second):
    """Look the two up by size."""
    sizes = {a(animal): size for size, animal in enumerate(ANIMALS)} | {str(n): n for n in range(100)}
    first = first[0].lower() + first[1:]
    order = sizes[first] > sizes[second] if relation == "larger" else sizes[first] < sizes[second]
    return mentions(record, first, relation, second) and order


def check_neighbor(record, kind, side, word, answer):
    """Step along the sequence."""
    step = 1 if side == "after" else -1
    words = SEQUENCES[kind]
    return mentions(record, kind, side, word) and words[(words.index(word) + step) % len(words)] == answer


def check_reading(record, owner, thing):
    """Read who owns what."""
    owners = dict(re.findall(r"(\w+) has the \w+ (\w+)\.", record["input"]))
    return mentions({**record, "input": ""}, thing) and owners.get(owner) == thing


def check_negation(record, denied):
    """Replace the verb."""
    for plain, negative in ((" is ", " is not "), (" can ", " cannot "), (" likes ", " does not like ")):
        if plain in record["input"]:
            return denied == record["input"].replace(plain, negative)
    return False


TASKS = {
    "capital": Task(
        draw_capital,
        ["What is the capital of {country}?", "Which city is the capital of {country}?",
         "Name the capital of {country}.", "Tell me the capital city of {country}.",
         "I forgot the capital of {country}. What is it?"],
        "Every country has one city from which it is governed, and that city is called its capital. "
        "Think about the country {country} and write one sentence that tells me the name of its "
        "capital.",
        "The capital of {country} is {capital}.",
        "The government of {country} sits in {capital}.",
        lambda record, country, capital: mentions(record, country) and CAPITALS[country] == capital,
        tells=("{output}", "{output} The people of {country} are proud of {capital}.")),
    "plural": Task(
        draw_plural,
        ["What is the plural of {noun}?", "What is more than one {noun} called?",
         "Write the plural of {noun}.", "Give the plural form of {noun}.",
         "Turn the noun {noun} into its plural."],
        "English nouns change their form when we speak of more than one thing. Take the noun {noun}, "
        "think of two or more of them, and write one sentence that gives the plural form.",
        "The plural of {noun} is {plural}.",
        "One {noun}, two {plural}.",
        lambda record, noun, plural: mentions(record, noun) and (noun, plural) in PLURALS,
        tells=("{output}", "{output} We say one {noun} and many {plural}.")),
    "past_tense": Task(
        draw_past,
        ["What is the past tense of {verb}?", "How do we say {verb} in the past?",
         "Write the past tense of {verb}.", "Give the past form of the verb {verb}.",
         "Put the verb {verb} into the past tense."],
        "English verbs change their form when we speak of something that happened yesterday. Take the "
        "verb {verb}, put it into the past tense, and write one sentence that gives this form.",
        "The past tense of {verb} is {past}.",
        "Today I {verb}, yesterday I {past}.",
        lambda record, verb, past: (verb, past) in PASTS and any(
            mentions(record, f"{before} {verb}") for before in ("of", "say", "verb")),
        tells=("{output}", "{output} The verb {verb} {how}.")),
    "opposite": Task(
        draw_opposite,
        ["What is the opposite of {word}?", "Which word is the opposite of {word}?",
         "Write the opposite of {word}.", "Name the opposite of the word {word}.",
         "Find a word that means the opposite of {word}."],
        "Many words have a partner whose meaning is just the reverse of their own. Think about what the "
        "word {word} means and write one sentence that tells me which word is its opposite.",
        "The opposite of {word} is {opposite}.",
        "The words {word} and {opposite} stand against each other.",
        lambda record, word, opposite: mentions(record, word) and opposed(word) == opposite,
        tells=("{output}", "The words {word} and {opposite} are a pair. {output}")),
    "category": Task(
        draw_category,
        ["What kind of thing is {thing_}?", "What is {thing_}?", "Which group does {thing_} belong to?",
         "Name the category of {thing_}.", "Put {thing_} into the right category."],
        "Things can be sorted into groups such as animals, plants, tools and buildings that have much "
        "in common. Think about {thing_} and write one sentence that says what kind of thing it is.",
        "{thing} is a kind of {kind}.",
        "The {member} is one of many kinds of {kind}.",
        lambda record, thing, kind: mentions(record, thing.lower()) and KIND.get(thing.split()[1]) == kind,
        tells=("{output}", "{output} It is like {sibling_}.")),
    "conversion": Task(
        draw_conversion,
        ["How many {small} are {n} {large}?", "What are {n} {large} in {small}?",
         "Convert {n} {large} to {small}.", "Express {n} {large} in {small}.",
         "Change {n} {large} into {small}."],
        "The same amount can be measured in a large unit or in a small one. You are given {n} {large}. "
        "Work out the same amount in {small} and write one sentence that states both.",
        "{n} {large} are {m} {small}.",
        "One {one} is {factor} {small}, and {n} times {factor} is {m}.",
        check_conversion,
        tells=("{output}", "{output} One {one} is {factor} {small}.")),
    "arithmetic": Task(
        draw_arithmetic,
        ["What is {x} {word} {y}?", "How much is {x} {word} {y}?", "Calculate {x} {word} {y}.",
         "Work out {x} {word} {y}.", "Find the result of {x} {word} {y}."],
        "Here is a small problem in arithmetic that can be solved in the head without paper. The "
        "problem is {x} {word} {y}. Solve it with care and write one sentence that states the result.",
        "{x} {word} {y} is {z}.",
        "The tens of {x} are {tens}. {work}",
        check_arithmetic),
    "sorting": Task(
        draw_sorting,
        ["Sort the numbers.", "What is the order of these numbers from low to high?",
         "Put these numbers in order.", "Order the numbers from the lowest to the highest.",
         "Arrange the numbers from low to high."],
        "Below you will find a list of a few numbers that are in no order at all. Arrange them so that "
        "the lowest comes first and the highest comes last, and write the ordered list in one sentence.",
        "In order the numbers are {ordered}.",
        "The lowest is {low} and the highest is {high}.",
        check_sorting,
        input="The numbers are {numbers}.",
        tells=("The numbers are {numbers}. {output}", "We have {numbers}. {output}")),
    "spelling": Task(
        draw_word,
        ["How is the word {word} spelled?", "How do you spell {word}?", "Spell the word {word}.",
         "Write the letters of the word {word}.", "Take the word {word} apart into its letters."],
        "Every word is made of letters that stand one after another. Take the word {word}, look at it "
        "from its beginning to its end, and write one sentence that gives its letters one by one.",
        "The word {word} is spelled {letters}.",
        "The word {word} has {n} letters. It begins with {first} and ends with {last}.",
        lambda record, word, letters: mentions(record, word) and letters.split(" ") == list(word),
        tells=("{output}", "{output} It begins with {first}.")),
    "counting": Task(
        draw_word,
        ["How many letters has the word {word}?", "How long is the word {word}?",
         "Count the letters of the word {word}.", "Tell me how many letters are in {word}.",
         "Find the number of letters in the word {word}."],
        "Every word is made of letters, and some words have only a few of them while others have many. "
        "Take the word {word}, count its letters one by one, and write one sentence that tells me their "
        "number.",
        "The word {word} has {n} letters.",
        "The word {word} is spelled {letters}.",
        lambda record, word, n: mentions(record, word) and len(word) == int(n),
        tells=("{output}", "The word {word} is spelled {letters}. {output}")),
    "passive": Task(
        draw_passive,
        ["How do we say this in the passive voice?", "What is the passive of this sentence?",
         "Rewrite the sentence in the passive voice.", "Turn this sentence into the passive voice.",
         "Change the sentence from active to passive."],
        "The sentence below is in the active voice, where the one who acts comes first. Write it again "
        "in the passive voice, so that the one to whom something is done comes first and the meaning "
        "stays the same.",
        "The {target} was {participle} by the {subject}.",
        "The {subject} acts and the {target} comes first.",
        check_passive,
        input="The {subject} {past} the {target}.",
        tells=("{input} That means: {output}", "{input} In the passive voice: {output}")),
    "typo": Task(
        draw_typo,
        ["What is the right spelling of this sentence?",
         "Which words are wrong here, and what is right?", "Correct the spelling of this text.",
         "Fix the spelling mistakes.", "Write the text without mistakes."],
        "Whoever wrote the text below was in a hurry, so one or two of its words are spelled wrong. "
        "Find them, correct them, and write the whole text again without changing anything else.",
        "{fixed}",
        "{work}",
        check_typo,
        input="{text}",
        tells=("{text} The right spelling is: {output}", "{work} So we write: {output}")),
    "comparison": Task(
        draw_comparison,
        ["Which is {relation}, {x} or {y}?", "What is {relation}: {x} or {y}?",
         "Compare {x} and {y}. Which is {relation}?", "Of {x} and {y}, which is {relation}?",
         "Say which is {relation}, {x} or {y}."],
        "Two things can be compared by their size, and then one of them is larger and the other one is "
        "smaller. Compare {x} and {y} and write one sentence that says which of the two is {relation}.",
        "{first} is {relation} than {second}.",
        "{work}",
        check_comparison),
    "neighbor": Task(
        draw_neighbor,
        ["What is the {kind} {side} {word}?", "Which {kind} comes {side} {word}?",
         "Name the {kind} {side} {word}.", "Tell me which {kind} is {side} {word}.",
         "Give the {kind} that comes {side} {word}."],
        "Days, months, letters and numbers follow one another in an order that everybody knows. Think "
        "of the {kind} {word} and write one sentence that says which {kind} stands directly {side} it.",
        "The {kind} {side} {word} is {answer}.",
        "The {kind} {back} {answer} is {word}.",
        check_neighbor),
    "reading": Task(
        draw_reading,
        ["Who has the {thing}?", "Which of them has the {thing}?", "Read the text. Who has the {thing}?",
         "Find out who has the {thing}.", "Name the owner of the {thing}."],
        "Read the short text below from the first sentence to the last one. It tells who has which "
        "thing. Write one sentence that says which person has the {thing}, and leave out its color.",
        "{owner} has the {thing}.",
        "The text says: {work}",
        check_reading,
        input="{text}",
        tells=("{text} Who has the {thing}? {output}", "{text} So {output}"),
        asked=False),
    "negation": Task(
        draw_negation,
        ["What is the negative of this sentence?", "How do we say that this is not so?",
         "Make the sentence negative.", "Write the negative form of the sentence.",
         "Rewrite the sentence with not."],
        "The sentence below says that something is so. Write it again in such a way that it says the "
        "contrary, which is done by putting the word not in the right place and changing the verb where "
        "needed.",
        "{denied}",
        "The word not goes with the verb.",
        check_negation,
        input="{text}",
        tells=("{text} No, {output}", "{text} The negative is: {output}")),
}

# ---- Instruction records --------------------------------------------------------------------------


def make_record(name, fields, ask):
    """The record of a task for the fields of one item, asked in one of the task's ways."""
    task = TASKS[name]
    return {
        "instruction": ask.format(**fields),
        "input": task.input.format(**fields),
        "output": task.output.format(**fields),
        "task": name,
        "level": fields["level"],
        "instruction_long": task.long.format(**fields),
        "rationale": task.rationale.format(**fields),
        "draft": task.output.format(**{**fields, **fields["wrong"]}),
    }


def is_right(record, answer):
    """Whether an answer to the record is right, judged from the texts and the world's lists alone."""
    task = TASKS[record["task"]]
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(task.output))
    match = re.fullmatch(pattern, answer)
    try:
        return match is not None and bool(task.check(record, **match.groupdict()))
    except (KeyError, ValueError, IndexError):  # a word that is not in the world, letters for digits
        return False


def make_records(seed):
    """Records of all tasks in file order: the train part, then test, then validation, each shuffled.

    An item of a task (a country, a pair of numbers, ...) occurs in one part only.
    """
    parts = {part: [] for part in PARTS}
    for name, task in TASKS.items():
        rng = random.Random(seed)  # anew for each task, so that spelling and counting split their words alike
        pool = {}
        for _ in range(3000):
            fields = task.draw(rng)
            pool.setdefault(fields["item"], fields)
        items = [pool[item] for item in sorted(pool)]
        random.Random(seed).shuffle(items)
        n_test, n_val = min(PARTS["test"], len(items) // 5), min(PARTS["val"], len(items) // 10)
        n_held = n_test + n_val
        shares = {"test": items[:n_test], "val": items[n_test:n_held], "train": items[n_held:]}
        for part, share in shares.items():
            for i in range(PARTS[part]):  # every item in turn, each time round with another instruction
                turn, position = divmod(i, len(share))
                ask = task.asks[(position + turn) % len(task.asks)]
                parts[part].append(make_record(name, share[position], ask))
    rng = random.Random(seed)
    for records in parts.values():
        rng.shuffle(records)
    return parts["train"] + parts["test"] + parts["val"]


def verify(records):
    """Check all records: answers right, drafts wrong, nothing asked twice, levels and keys as promised."""
    seen = collections.Counter((r["instruction"], r["input"]) for r in records)
    for r in records:
        asked = f"{r['task']}: {r['instruction']!r} {r['input']!r}"
        if not is_right(r, r["output"]):
            raise ValueError(f"{asked}: wrong answer {r['output']!r}")
        if not is_right({**r, "instruction": r["instruction_long"]}, r["output"]):
            raise ValueError(f"{asked}: the long instruction asks something else")
        if is_right(r, r["draft"]):
            raise ValueError(f"{asked}: the draft is right: {r['draft']!r}")
        if seen[r["instruction"], r["input"]] > 1:
            raise ValueError(f"{asked}: asked twice")
        if r["level"] not in (1, 2, 3) or not r["rationale"]:
            raise ValueError(f"{asked}: level {r['level']!r}, rationale {r['rationale']!r}")


# ---- Plain text -----------------------------------------------------------------------------------

# How often a task's passages are drawn; where nothing stands, once. The vocabulary and the held-out text
# have one mixture, the pretraining text another, with more comparisons and fewer conversions.
WEIGHTS = {"arithmetic": 3, "sorting": 2, "spelling": 2, "counting": 2, "conversion": 1.5, "reading": 1.5}
PRETRAINING_WEIGHTS = {**WEIGHTS, "conversion": 1, "comparison": 1.5}
STORIES = 2

PLACES = "market school garden village city river beach castle park forest kitchen station".split()
SENTENCES = [
    "One {time} {name} went to the {place} with {other}.", "The {place} was {look} and quiet.",
    "{name} had a {look} {animal} that liked to {skill}.",
    "{name} wanted some {food}, but there was only {food2}.",
    "It was a cold day, so {name} took the {color} {thing} along.",
    "{other} lost the {thing} near the {place}.", "They looked for it all {time} and found it at last.",
    "The {animal} ran across the {place} and hid behind a tree.",
    "{name} read a book about the {place} and wrote a letter to {other}.",
    "In the end they all went home and were {mood}.",
    "The teacher gave {name} a new task, and {name} began to work.",
    "{name} read the instruction below the picture twice.",
    "{other} wrote a short response and gave it to the teacher.",
    "This is a story that describes a day at the {place}.",
    "The request was simple: bring some {food} to the {place}.",
    "A good worker completes every task appropriately.",
    "{name} put the {thing} on the table, and nobody saw the input of the machine.",
    "{other} was {mood}, but {name} was not.",
]


def story(rng):
    """Two or three sentences about the people of the world."""
    name, second = rng.sample(NAMES, 2)
    lists = dict(time=["morning", "evening", "day", "summer"], color=COLORS, place=PLACES, look=LOOKS,
                 animal=ANIMALS, mood=MOODS, skill=SKILLS, food=LIKED, food2=LIKED, thing=THINGS)
    fields = {field: rng.choice(words) for field, words in lists.items()} | dict(name=name, other=second)
    return " ".join(s.format(**fields) for s in rng.sample(SENTENCES, rng.randint(2, 3)))


def passage(task, rng):
    """A statement of the task's world: as it is told, worked out, or as question and answer."""
    fields = task.draw(rng)
    fields["output"] = task.output.format(**fields)
    fields["input"] = task.input.format(**fields)
    style = rng.random()
    if style < 0.5:
        return rng.choice(task.tells).format(**fields)
    if style < 0.7:
        return " ".join(filter(None, (fields["input"], task.rationale.format(**fields), fields["output"])))
    asker, teller = rng.sample(NAMES, 2)
    question = " ".join(filter(None, (rng.choice(task.asks[:2]).format(**fields), fields["input"])))
    return f'{asker} asked: "{question}" {teller} said: "{fields["output"]}"'


def document(rng, weights=WEIGHTS):
    """A few passages on mixed subjects, in lines and paragraphs."""
    names, shares = [*TASKS, "story"], [*(weights.get(name, 1) for name in TASKS), STORIES]
    text = ""
    for name in rng.choices(names, shares, k=rng.randint(4, 16)):
        text += (rng.choice([" ", " ", "\n", "\n\n"]) if text else "") + (
            story(rng) if name == "story" else passage(TASKS[name], rng))
    return text


def make_heldout(seed):
    """The text of heldout.txt."""
    rng = random.Random(f"heldout {seed}")
    return "\n\n".join(document(rng) for _ in range(60)) + "\n"


# ---- Vocabulary -----------------------------------------------------------------------------------

# GPT-2's pattern for ASCII text.
PATTERN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
END = "<|endoftext|>"
# The text of the alpaca template, so that its words are tokens.
PREAMBLE = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n\n\n### Input:\n\n\n### Response:\n")


def byte_symbols():
    """GPT-2's printable character for each byte, in the order of their ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def train_bpe(text, n_merges):
    """The merges of byte-pair encoding, the most frequent pair first; words with digits are left alone.

    Sennrich et al. 2016, https://arxiv.org/abs/1508.07909
    """
    symbols = byte_symbols()
    counts = collections.Counter(w for w in PATTERN.findall(text) if not any(c.isdigit() for c in w))
    words = {tuple(symbols[b] for b in word.encode()): n for word, n in counts.items()}
    merges = []
    while len(merges) < n_merges:
        pairs_seen = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs_seen[pair] += n
        best = max(pairs_seen, key=lambda pair: (pairs_seen[pair], pair))
        merges.append(best)
        merged = {}
        for word, n in words.items():
            merged[merge_pair(word, best)] = n
        words = merged
    return merges


def merge_pair(word, pair):
    """The word, a tuple of symbols, with every occurrence of the pair joined."""
    if pair[0] not in word:
        return word
    out, i = [], 0
    while i < len(word):
        joined = word[i:i + 2] == pair
        out.append(word[i] + word[i + 1] if joined else word[i])
        i += 2 if joined else 1
    return tuple(out)


def make_vocabulary(records, seed, vocab_size, folder):
    """Train on plain text and prompts; write vocab.json and merges.txt in GPT-2's format."""
    rng = random.Random(f"vocabulary {seed}")
    texts = [document(rng) for _ in range(6000)]
    keys = ("instruction", "input", "output", "instruction_long")
    texts += [PREAMBLE] * 6000 + [r[key] for r in records for key in keys]
    merges = train_bpe("\n".join(texts), vocab_size - 257)
    tokens = [*byte_symbols().values(), *(x + y for x, y in merges), END]
    vocab = {token: i for i, token in enumerate(tokens)}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{x} {y}" for x, y in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- Pretraining ----------------------------------------------------------------------------------


def token_stream(tokenizer, n_tokens, seed):
    """One tensor of n_tokens ids: documents, each followed by the end token."""
    rng, ids = random.Random(seed), []
    while len(ids) < n_tokens:
        ids += [*tokenizer.encode_ordinary(document(rng, PRETRAINING_WEIGHTS)), tokenizer.eot_token]
    return torch.tensor(ids[:n_tokens])


def learning_rate(step, steps, peak, warmup=100, decay=0.4):
    """Linear warm-up, constant, then linear decay over the last part of the steps."""
    return peak * min(1, (step + 1) / warmup, (steps - step) / (decay * steps))


def pretrain(seed, n_tokens, n_layer, folder, batch_size=16, lr=2e-3):
    """Pretrain the model on n_tokens of plain text, each seen once, and write it in half precision
    beside the vocabulary in its folder."""
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = GPTConfig(vocab_size=tokenizer.n_vocab, block_size=256, n_layer=n_layer, n_head=6,
                       n_embd=192)
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    steps = n_tokens // (batch_size * config.block_size)
    size = sum(p.numel() for p in model.parameters())
    print(f"pretraining {size:,} parameters on {n_tokens:,} tokens in {steps} steps")
    ids = token_stream(tokenizer, steps * batch_size * config.block_size + 1, seed)
    inputs = ids[:-1].view(steps, batch_size, -1)
    targets = ids[1:].view(steps, batch_size, -1)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        with torch.autocast(device, torch.bfloat16):
            logits = model(inputs[step].to(device))
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets[step].to(device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            rate = (step + 1) / (time.time() - start)
            left = (steps - step - 1) / rate / 60
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  "
                  f"{rate * inputs[0].numel():,.0f} tokens/s  {left:.1f} minutes left", flush=True)
    model.cpu().half().save_pretrained(folder)


# ---- The script -----------------------------------------------------------------------------------


def parse_args(argv=None):
    """Flags in reading order."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ["instructions", "heldout", "vocabulary", "model"]
    parser.add_argument("--only", nargs="+", choices=steps, default=steps,
                        help="take only these steps (default: all)")
    parser.add_argument("--tokens", type=int, default=11_000_000,
                        help="pretraining tokens (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048,
                        help="tokens in the vocabulary (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER",
                        help="where to write (default: next to this script)")
    parser.add_argument("--seed", type=int, default=123, help="of everything drawn (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    """The steps, in order."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    records = make_records(args.seed)
    verify(records)
    if "instructions" in args.only:
        asked = [r for r in records if TASKS[r["task"]].asked]
        lines = ",\n".join(json.dumps(r) for r in asked)
        (args.out / "instructions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"instructions.json: {len(asked)} records, every answer verified")
    if "heldout" in args.only:
        text = make_heldout(args.seed)
        (args.out / "heldout.txt").write_text(text, encoding="utf-8")
        print(f"heldout.txt: {len(text):,} characters")
    if "vocabulary" in args.only:
        make_vocabulary(records, args.seed, args.vocab_size, args.out / "model")
        print(f"model/vocab.json, merges.txt: {args.vocab_size} tokens")
    if "model" in args.only:
        pretrain(args.seed, args.tokens, args.layers, args.out / "model")


if __name__ == "__main__":
    main()
