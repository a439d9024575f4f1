"""Articles, plurals and gender, as far as captions need them."""

from __future__ import annotations

import re

__all__ = ["agreeing", "article", "definite", "is_feminine", "names_several", "number", "plural"]

_NUMBER = {
    2: ("two", "dos", "dois", "两个"),
    3: ("three", "tres", "três", "三个"),
    4: ("four", "cuatro", "quatro", "四个"),
}


def _words(text: str) -> list[str]:
    return text.split()


# Spanish and Portuguese nouns of the corpus that do not end as their gender would have it.
_FEMININE = _words("""
    baguete caminhonete carne ciudad cidade claquete coliflor colher corrente correntes cruz engrenagem flor fonte
    fuente llave chave luz luces lápide maçã mão mano mamá mamãe moto mujer mujeres mulher mulheres noche noite nube
    nuvem pá ponte raíz sartén serpiente serpente señal sirene torre vagem van árvore
""")
_MASCULINE = _words("""
    alienígena artista astronauta bisão caça-níquel cinema coala cometa coração curinga dia día dna emblema fantasma
    fotograma gorila guarda guarda-chuva guarda-sol guardia ideograma khanda koala mapa marcapáginas ninja oficinista
    panda paracaídas paraguas paraquedas pentagrama pijama planeta quebra-cabeça salvavidas tranvía
""")
_FEMININE_IN = {1: ("nariz", "sal"), 2: ()}  # in one of the languages alone
_GERUND = ("ando", "endo", "indo", "ndose")
_FEMININE_ENDS = ("a", "as", "ción", "sión", "ção", "são", "dad", "dade")
# A name's head ends before these, and gerunds begin what it does.
_AFTER_HEAD = _words("""
    a al ao atrás com con da de del detrás do e el em en entre hacia la mas na nas no nos o para pero por que se sem sin
    sobre u um uma un una y à às
""")
_NO_PLURAL = ("naranja", "rosa", "laranja", "cinza", "3D", "simples")  # of adjectives
_LOOKS = ("plano", "plana", "simple")  # behind all that belongs to a name
_PLURALS = """
    child/children deer/deer dice/dice elf/elves fish/fish foot/feet goose/geese knife/knives leaf/leaves loaf/loaves
    mouse/mice ox/oxen person/people potato/potatoes sheep/sheep squid/squid tomato/tomatoes tooth/teeth wolf/wolves
"""
_ROMANCE = """
    alto-falante/alto-falantes cachorro-quente/cachorros-quentes cão/cães cão-guia/cães-guia e-mail/e-mails gol/gols
    guarda-chuva/guarda-chuvas guarda-sol/guarda-sóis joven/jóvenes mapa-múndi/mapas-múndi mão/mãos
    porco-espinho/porcos-espinhos pão/pães quebra-cabeça/quebra-cabeças render/renders água-viva/águas-vivas
"""
_IRREGULAR, _ROMANCE_IRREGULAR = (dict(pair.split("/") for pair in _words(text)) for text in (_PLURALS, _ROMANCE))
_UNCHANGED = ("não", "meio", "nada")
_ENDS_IN_S = _words("""
    arcoíris aries autobús bíceps cactus géminis marcapáginas menos minibús más paracaídas paraguas pintalabios piscis
    portapapeles salvavidas seis tenis tres trolebús arco-íris flor-de-lis lápis lótus paraquedas três trólebus tênis
    xis ônibus
""")  # and is one
_STRESSED_A = ("agua", "ala", "ancla", "arpa", "hacha", "águila", "ánfora")  # la, but el before it
_BARE = str.maketrans("áéíóúâêô", "aeiouaeo")
_FOLLOWS = (
    "with|without|in|on|that|reading|showing|lifting|behind|pointing|holding|of|blowing|screaming|increasing|fluttering|"
    "shaking|feeding"
)
_SINGULAR_S = ("ss", "us", "is", "ros", "gas", "lens", "canvas")
_ARE_SEVERAL = ("men", "women", "people", "skis")
_STYLED = ("render", "sticker", "cartoon", "icon", "silhouette")


def article(noun: str) -> str:
    """The English noun with its "a" or "an"; without, where it names several (`scissors`, `grapes`)."""
    head, _, rest = noun.partition(" of ")
    if _is_plural(_head(head if head.endswith(_STYLED) else noun)):
        return noun
    vowel = noun.startswith(("hour", "honest", "x-ray", "sos ", "ng ", "mx "))
    consonant = noun.startswith(("uni", "eu", "use", "uk", "ufo", "one-", "one ", "ewe"))
    return ("an " if (noun[:1] in "aeiou" and not consonant) or vowel else "a ") + noun


def number(count: int, language: int, feminine: bool = False) -> str:
    """2 to 4 as a word, of which Portuguese has a feminine two."""
    return "duas" if (count, language, feminine) == (2, 2, True) else _NUMBER[count][language]


def is_feminine(noun: str, language: int) -> bool:
    """Of a Spanish (1) or Portuguese (2) noun, by its first word."""
    whole = re.split(r"[ ,:]", noun)[0].lower().removeprefix("super-")
    word = whole.split("-")[0]
    known = word in _FEMININE or word in _FEMININE_IN[language]
    return known or (word.endswith(_FEMININE_ENDS) and not {whole, word} & set(_MASCULINE))


def names_several(noun: str, language: int) -> bool:
    """Whether one of it is called by a plural already: `scissors`, `uvas`, `óculos`."""
    if language in (0, 3):
        return language == 0 and _is_plural(_head(noun))
    word = re.split(r"[ ,:]", noun)[0].lower()
    return word.endswith("s") and word not in _ENDS_IN_S


def definite(noun: str, language: int, *, of: bool = False) -> str:
    """The Spanish or Portuguese noun with its article, and with "de" if it is of it: `la taza`, `del letrero`, `da
    caneca`."""
    feminine = is_feminine(noun, language)
    article = {1: ("el", "la", "los", "las"), 2: ("o", "a", "os", "as")}[language][
        feminine + 2 * names_several(noun, language)
    ]
    if language == 1 and noun.split(" ")[0] in _STRESSED_A:
        article = "el"
    if of and language == 2:
        article = f"d{article}"
    elif of:
        article = "del" if article == "el" else f"de {article}"
    return f"{article} {noun}"


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
    told = [*(_romance_plural(word, language, k) for k, word in enumerate(words[:head])), *words[head:]]
    if head < len(words) and words[-1] in _LOOKS:
        told[-1] = _romance_plural(words[-1], language, 1)
    return " ".join(told)


def _romance_plural(word: str, language: int, place: int) -> str:
    bare = word.rstrip(",:")
    if bare in _ROMANCE_IRREGULAR:
        return _ROMANCE_IRREGULAR[bare] + word[len(bare) :]
    if bare != word:
        return _romance_plural(bare, language, place) + word[len(bare) :]
    if (place and word in _NO_PLURAL) or not word.isalpha() or word in _UNCHANGED or word.endswith("mente"):
        return word
    if word.endswith(("és", "ês", "ús")) and word not in ("três", "más"):
        return word[:-2] + word[-2].translate(_BARE) + "ses"
    if word.endswith(("s", "x")) and word != "gris":
        return word
    if language == 2:
        accent = word != word.translate(_BARE)
        ends = ("el", "eis" if accent else "éis"), ("il", "eis" if accent else "is")
        for end, many in (*ends, ("ão", "ões"), ("al", "ais"), ("ol", "óis"), ("ul", "uis"), ("m", "ns")):
            if word.endswith(end):
                return word.removesuffix(end) + many
    for end, many in (("z", "zes" if language == 2 else "ces"), ("ón", "ones"), ("án", "anes"), ("ín", "ines")):
        if word.endswith(end):
            return word.removesuffix(end) + many
    return word + ("es" if word.endswith(("r", "z") if language == 2 else tuple("lnrdzjys") + ("ch",)) else "s")


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
    return re.split(rf"[,:]| (?:{_FOLLOWS})\b", noun)[0]


def _is_plural(noun: str) -> bool:
    last = noun.split(" ")[-1]
    if last in _ARE_SEVERAL:
        return True
    return last.endswith("s") and not last.endswith(_SINGULAR_S) and not noun.endswith("cross")
