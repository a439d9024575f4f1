"""Names that captions are made of, in English, Spanish, Portuguese and Chinese, and the words written on signs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from glmimg.corpus.splits import is_held_out_word
from glmimg.corpus.stickers import Concept

# name: (red, green, blue), then the colour's name in en, es, pt, zh
COLOURS: dict[str, tuple[tuple[int, int, int], tuple[str, str, str, str]]] = {
    "red": ((222, 44, 50), ("red", "rojo", "vermelho", "红色")),
    "orange": ((245, 138, 31), ("orange", "naranja", "laranja", "橙色")),
    "yellow": ((250, 211, 50), ("yellow", "amarillo", "amarelo", "黄色")),
    "green": ((62, 163, 75), ("green", "verde", "verde", "绿色")),
    "blue": ((48, 104, 208), ("blue", "azul", "azul", "蓝色")),
    "purple": ((132, 72, 184), ("purple", "morado", "roxo", "紫色")),
    "pink": ((243, 140, 184), ("pink", "rosa", "rosa", "粉色")),
    "brown": ((128, 82, 50), ("brown", "marrón", "marrom", "棕色")),
    "black": ((28, 28, 32), ("black", "negro", "preto", "黑色")),
    "white": ((250, 250, 248), ("white", "blanco", "branco", "白色")),
    "grey": ((140, 144, 150), ("grey", "gris", "cinza", "灰色")),
}
PALETTE = {name: rgb for name, (rgb, _) in COLOURS.items()}
# Backgrounds add pale and dark variants, so that stickers stand out as they do on real pages.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[str, str, str, str]]] = {
    **COLOURS,
    "light blue": ((186, 222, 250), ("light blue", "celeste", "azul claro", "浅蓝色")),
    "light green": ((200, 235, 196), ("light green", "verde claro", "verde claro", "浅绿色")),
    "light yellow": ((253, 243, 190), ("light yellow", "amarillo claro", "amarelo claro", "浅黄色")),
    "light pink": ((252, 220, 230), ("light pink", "rosa claro", "rosa claro", "浅粉色")),
    "light purple": ((224, 208, 244), ("light purple", "lila", "lilás", "浅紫色")),
    "beige": ((240, 226, 200), ("beige", "beige", "bege", "米色")),
    "dark blue": ((24, 40, 92), ("dark blue", "azul oscuro", "azul escuro", "深蓝色")),
    "dark green": ((20, 70, 48), ("dark green", "verde oscuro", "verde escuro", "深绿色")),
    "teal": ((32, 148, 148), ("teal", "turquesa", "turquesa", "青色")),
}
SHAPES: dict[str, tuple[str, str, str, str]] = {
    "circle": ("circle", "círculo", "círculo", "圆形"),
    "square": ("square", "cuadrado", "quadrado", "正方形"),
    "triangle": ("triangle", "triángulo", "triângulo", "三角形"),
    "star": ("star", "estrella", "estrela", "星形"),
    "heart": ("heart", "corazón", "coração", "心形"),
    "ring": ("ring", "anillo", "anel", "圆环"),
    "cross": ("cross", "cruz", "cruz", "十字"),
    "hexagon": ("hexagon", "hexágono", "hexágono", "六边形"),
}
SIGNS: dict[str, tuple[str, str, str, str]] = {
    "sign": ("sign", "letrero", "placa", "牌子"),
    "bubble": ("speech bubble", "globo de diálogo", "balão de fala", "对话气泡"),
    "mug": ("mug", "taza", "caneca", "马克杯"),
    "shirt": ("t-shirt", "camiseta", "camiseta", "T恤"),
    "banner": ("banner", "pancarta", "faixa", "横幅"),
}
STYLE_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "3d": (("3D render", "3D"), ("render 3D", "3D"), ("render 3D", "3D"), ("3D渲染", "3D")),
    "flat": (("flat sticker", "flat"), ("pegatina plana", "plano"), ("adesivo plano", "plano"), ("扁平贴纸", "扁平")),
    "cartoon": (
        ("detailed cartoon", "cartoon"),
        ("dibujo detallado", "dibujo"),
        ("desenho detalhado", "desenho"),
        ("精细卡通", "卡通"),
    ),
    "simple": (
        ("simple icon", "simple"),
        ("icono simple", "simple"),
        ("ícone simples", "simples"),
        ("简单图标", "简单"),
    ),
    "silhouette": (("silhouette",), ("silueta",), ("silhueta",), ("剪影",)),
}
# What people ask for first: a small model that draws these well is worth more than one that draws everything badly. The
# first of them are few enough to be learnt by heart in an hour on two cores.
_FIRST = """
    cat; dog; fox; owl; penguin; frog; turtle; fish; octopus; crab; butterfly; honeybee; horse; pig; panda; bear;
    cat face; dog face; rabbit face; sunflower; tulip; cactus; mushroom; palm tree;
    red apple; strawberry; banana; lemon; watermelon; grapes; pineapple; carrot; pizza; doughnut; ice cream; cupcake;
    grinning face; smiling face with sunglasses; robot; red heart;
    house; automobile; bus; sailboat; airplane; rocket; sun; star; cloud; rainbow; umbrella; snowman; fire; balloon;
    trophy; soccer ball; teddy bear; christmas tree; wrapped gift; crown; bell; light bulb; key; gem stone
"""
_COMMON = """
    gorilla; wolf; raccoon; tiger; leopard; unicorn; zebra; deer; cow; ram; camel; giraffe; mouse; hamster;
    hedgehog; sloth; kangaroo; chicken; rooster; eagle; duck; swan; peacock; goose; crocodile; snake; dragon; t-rex;
    whale; dolphin; shark; lobster; snail; bug; ant; spider; rose; polar bear; baby chick; tropical fish; four leaf
    clover; evergreen tree; maple leaf; black cat; melon; tangerine; mango; pear; peach; tomato; coconut; avocado;
    eggplant; broccoli; bread; croissant; pretzel; pancakes; sandwich; taco; popcorn; cookie; candy; lollipop;
    teapot; egg; bell pepper; hot pepper; hot dog; birthday cake; french fries; hot beverage; beer mug; cheese
    wedge; winking face; smiling face with heart-eyes; crying face; angry face; sleeping face; thinking face; nerd
    face; skull; alien; blue heart; pile of poo; compass; volcano; castle; hospital; school; locomotive; ambulance;
    taxi; tractor; motorcycle; bicycle; ship; helicopter; snowflake; full moon; crescent moon; alarm clock; police
    car; fire engine; racing car; high voltage; baseball; basketball; kite; joystick; glasses; necktie; dress;
    scarf; backpack; ring; top hat; microphone; radio; trumpet; guitar; violin; drum; telephone; laptop; television;
    camera; candle; books; hammer; scissors; pencil; magnet; ladder; door; bed; chair; bathtub; toothbrush; mobile
    phone; money bag; old key; bomb; sponge; basket
"""
FIRST_THINGS, _others = (tuple(" ".join(name.split()) for name in names.split(";")) for names in (_FIRST, _COMMON))
COMMON_THINGS = frozenset((*FIRST_THINGS, *_others))
LANGUAGE_INDEX = {"en": 0, "es": 1, "pt": 2, "zh": 3}

_LATIN = re.compile(r"[a-záéíóúüñâêôãõçà]{2,10}")
_HAN = re.compile(r"[\u4e00-\u9fff]{1,4}")


def sign_words(concepts: Iterable[Concept], *, held_out: bool = False) -> dict[str, list[str]]:
    """Words to write, by language, taken from the concepts' own names and tags.

    The held-out words (see `splits`) are the other part: no training scene ever shows one.
    """
    found: dict[str, set[str]] = {lang: set() for lang in LANGUAGE_INDEX}
    for concept in concepts:
        for lang, words in found.items():
            texts = [concept.labels.get(lang, ""), *concept.tags.get(lang, [])]
            pattern = _HAN if lang == "zh" else _LATIN
            words.update(w for text in texts for w in pattern.findall(text.lower()))
    return {lang: sorted(w for w in words if is_held_out_word(w) == held_out) for lang, words in found.items()}
