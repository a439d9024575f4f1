"""Articles, plurals and gender, as far as captions need them."""

from __future__ import annotations

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
    noche noite nube nuvem pá ponte sal sartén serpiente serpente señal sirene torre árvore
""")
_MASCULINE = _words("""
    alienígena artista astronauta cinema coala cometa coração curinga dia día emblema fantasma fotograma gorila guarda
    guardia ideograma khanda mapa marcapáginas ninja oficinista panda paracaídas paraguas paraquedas pentagrama pijama
    planeta salvavidas tranvía
""")
_NO_PLURAL = ("naranja", "rosa", "laranja", "cinza", "3D", "simples")  # of adjectives
_PLURALS = """
    child/children deer/deer dice/dice fish/fish foot/feet goose/geese knife/knives leaf/leaves loaf/loaves man/men
    mouse/mice ox/oxen person/people sheep/sheep squid/squid tooth/teeth wolf/wolves woman/women
    cão/cães mão/mãos pão/pães render/renders
"""
_IRREGULAR = dict(pair.split("/") for pair in _words(_PLURALS))
_SINGULAR_S = ("ss", "us", "is", "gas", "lens", "canvas")


def article(noun: str) -> str:
    """The English noun with its "a" or "an"; without, where it names several (`scissors`, `grapes`)."""
    if _is_plural(noun.split(",")[0].split(" with ")[0].split(" in ")[0]):
        return noun
    silent_h, spoken_y = noun.startswith(("hour", "honest")), noun.startswith(("uni", "eu", "use", "uk", "ufo"))
    return ("an " if (noun[:1] in "aeiou" and not spoken_y) or silent_h else "a ") + noun


def number(count: int, language: int, feminine: bool = False) -> str:
    """2 to 4 as a word, of which Portuguese has a feminine two."""
    return "duas" if (count, language, feminine) == (2, 2, True) else _NUMBER[count][language]


def is_feminine(noun: str) -> bool:
    """Of a Spanish or Portuguese noun, by its first word."""
    word = noun.split(" ")[0].split(",")[0].split("-")[0].lower()
    return word in _FEMININE or (word.endswith(("a", "as", "ción", "ção", "dad", "dade")) and word not in _MASCULINE)


def agreeing(adjective: str, feminine: bool) -> str:
    """The Spanish or Portuguese adjective: `rojo`, or `roja`; `azul` and other endings are both."""
    return adjective[:-1] + "a" if feminine and adjective.endswith("o") else adjective


def plural(noun: str, language: int) -> str:
    """Of a whole phrase: English `flat foxes`, Spanish `estrellas rojas`, Portuguese `corações azuis`."""
    if language == 3:
        return noun
    if language == 0:
        return _english_plural(noun)
    head, of, rest = noun.partition(" de ")
    words = head.split(" ")
    return " ".join(_romance_plural(word, language, k) for k, word in enumerate(words)) + of + rest


def _romance_plural(word: str, language: int, place: int) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if (place and word in _NO_PLURAL) or not word.isalpha() or (word.endswith("s") and word != "gris"):
        return word
    if language == 2:
        for end, many in (("ão", "ões"), ("el", "éis"), ("al", "ais"), ("ol", "óis"), ("ul", "uis"), ("m", "ns")):
            if word.endswith(end):
                return word.removesuffix(end) + many
    for end, many in (("z", "zes" if language == 2 else "ces"), ("ón", "ones"), ("án", "anes"), ("ín", "ines")):
        if word.endswith(end):
            return word.removesuffix(end) + many
    return word + ("s" if word.endswith(tuple("aeiouáéíóúâêôãn")) and not word.endswith("en") else "es")


def _english_plural(noun: str) -> str:
    for of in (" of ", " that says ", " with ", " reading "):
        head, found, rest = noun.partition(of)
        if found and (of != " of " or head.endswith(("render", "sticker", "cartoon", "icon", "silhouette"))):
            return _english_plural(head) + found + rest
    first, comma, more = noun.partition(",")
    start, space, last = first.rpartition(" ")
    if _is_plural(first):
        return noun
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return start + space + last + comma + more


def _is_plural(noun: str) -> bool:
    last = noun.split(" ")[-1]
    return last.endswith("s") and not last.endswith(_SINGULAR_S) and not noun.endswith("cross")
