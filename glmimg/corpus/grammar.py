"""Articles, plurals and gender, as far as captions need them."""

from __future__ import annotations

import re

__all__ = ["agreeing", "article", "is_feminine", "number", "plural"]

_NUMBER = {
    2: ("two", "dos", "dois", "两个"),
    3: ("three", "tres", "três", "三个"),
    4: ("four", "cuatro", "quatro", "四个"),
}


def _words(text: str) -> list[str]:
    return text.split()


# Spanish and Portuguese nouns of the corpus that do not end as their gender would have it.
_FEMININE = _words("""
    carne ciudad cidade coliflor colher corrente cruz engrenagem flor fonte fuente llave chave luz luces maçã mão mano
    mamá mamãe moto mujer mujeres mulher mulheres noche noite nube nuvem pá ponte raíz sal sartén serpiente serpente
    señal sirene torre vagem árvore
""")
_MASCULINE = _words("""
    alienígena artista astronauta cinema coala cometa coração curinga dia día emblema fantasma fotograma gorila guarda
    guardia ideograma khanda koala mapa marcapáginas ninja oficinista panda paracaídas paraguas paraquedas pentagrama
    pijama planeta salvavidas tranvía
""")
_GERUND = ("ando", "endo", "indo")
_FEMININE_ENDS = ("a", "as", "ción", "sión", "ção", "são", "dad", "dade")
# A name's head ends before these, and gerunds begin what it does.
_AFTER_HEAD = _words("de del da do con com sin sem en em por para y e a al ao o u un una um uma detrás atrás hacia")
_NO_PLURAL = ("naranja", "rosa", "laranja", "cinza", "3D", "simples")  # of adjectives
_PLURALS = """
    child/children deer/deer dice/dice elf/elves fish/fish foot/feet goose/geese knife/knives leaf/leaves loaf/loaves
    mouse/mice ox/oxen person/people potato/potatoes sheep/sheep squid/squid tomato/tomatoes tooth/teeth wolf/wolves
    cão/cães mão/mãos pão/pães render/renders
"""
_IRREGULAR = dict(pair.split("/") for pair in _words(_PLURALS))
_SINGULAR_S = ("ss", "us", "is", "ros", "gas", "lens", "canvas")
_STYLED = ("render", "sticker", "cartoon", "icon", "silhouette")


def article(noun: str) -> str:
    """The English noun with its "a" or "an"; without, where it names several (`scissors`, `grapes`)."""
    head, _, rest = noun.partition(" of ")
    if _is_plural(_head(head if head.endswith(_STYLED) else noun)):
        return noun
    silent_h, spoken_y = noun.startswith(("hour", "honest")), noun.startswith(("uni", "eu", "use", "uk", "ufo"))
    return ("an " if (noun[:1] in "aeiou" and not spoken_y) or silent_h else "a ") + noun


def number(count: int, language: int, feminine: bool = False) -> str:
    """2 to 4 as a word, of which Portuguese has a feminine two."""
    return "duas" if (count, language, feminine) == (2, 2, True) else _NUMBER[count][language]


def is_feminine(noun: str) -> bool:
    """Of a Spanish or Portuguese noun, by its first word."""
    word = re.split(r"[ ,:-]", noun)[0].lower()
    return word in _FEMININE or (word.endswith(_FEMININE_ENDS) and word not in _MASCULINE)


def agreeing(adjective: str, feminine: bool) -> str:
    """The Spanish or Portuguese adjective: `rojo`, or `roja`; `azul` and other endings are both."""
    return adjective[:-1] + "a" if feminine and adjective.endswith("o") else adjective


def plural(noun: str, language: int) -> str:
    """Of a whole phrase: English `flat foxes`, Spanish `estrellas rojas`, Portuguese `corações azuis`."""
    if language == 3:
        return noun
    if language == 0:
        return _english_plural(noun)
    words = noun.split(" ")
    ends = (
        k
        for k, word in enumerate(words)
        if k and (word in _AFTER_HEAD or word.endswith(_GERUND) or words[k - 1].endswith((",", ":")))
    )
    head = next(ends, len(words))
    return " ".join([*(_romance_plural(word, language, k) for k, word in enumerate(words[:head])), *words[head:]])


def _romance_plural(word: str, language: int, place: int) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if (place and word in _NO_PLURAL) or not word.isalpha() or (word.endswith("s") and word not in ("gris", "autobús")):
        return word
    if language == 2:
        for end, many in (("ão", "ões"), ("el", "éis"), ("al", "ais"), ("ol", "óis"), ("ul", "uis"), ("m", "ns")):
            if word.endswith(end):
                return word.removesuffix(end) + many
    for end, many in (("z", "zes" if language == 2 else "ces"), ("ón", "ones"), ("án", "anes"), ("ín", "ines")):
        if word.endswith(end):
            return word.removesuffix(end) + many
    if word == "autobús":
        return "autobuses"
    return word + ("s" if word.endswith(tuple("aeiouáéíóúâêôã")) else "es")


def _english_plural(noun: str) -> str:
    head, of, _ = noun.partition(" of ")
    first = head if of and head.endswith(_STYLED) else _head(noun)
    start, space, last = first.rpartition(" ")
    if _is_plural(first):
        return noun
    if last in _IRREGULAR:
        many = _IRREGULAR[last]
    elif last.endswith("man"):
        many = last[:-3] + "men"
    elif last.endswith(("s", "x", "ch", "sh")):
        many = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        many = last[:-1] + "ies"
    else:
        many = last + "s"
    return start + space + many + noun[len(first) :]


def _head(noun: str) -> str:
    """Up to what follows the name itself: `person` of `person lifting weights`."""
    return re.split(r",| (?:with|without|in|on|that|reading|showing|lifting|behind|pointing|holding|of)\b", noun)[0]


def _is_plural(noun: str) -> bool:
    last = noun.split(" ")[-1]
    return last.endswith("s") and not last.endswith(_SINGULAR_S) and not noun.endswith("cross")
