"""Where the corpus comes from: registry packages pinned by version and SHA-256.

Pictures never enter the repository; `fetch` brings the packages into a cache folder with the registries' own clients
(`npm`, `apt-get`) and refuses a file whose hash differs from the table.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from glmimg.errors import BadInput, MissingExtra


@dataclass(frozen=True)
class Package:
    """One registry package. `client` is npm or apt; `filename` is what the client saves."""

    name: str
    version: str
    filename: str
    sha256: str
    licence: str
    notice: str
    client: str = "npm"


def _npm(name: str, version: str, sha256: str, licence: str, notice: str) -> Package:
    filename = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    return Package(name, version, filename, sha256, licence, notice)


STICKER_PACKAGES: dict[str, Package] = {
    "3d": _npm(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        "Fluent Emoji 3D, Microsoft Corporation; packaged by LobeHub",
    ),
    "flat": _npm(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji flat, Microsoft Corporation",
    ),
    "silhouette": _npm(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        "Fluent Emoji high contrast, Microsoft Corporation",
    ),
    "cartoon": _npm(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji, Google",
    ),
    "simple": _npm(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc. and other contributors",
    ),
}

NAMES_PACKAGE = _npm(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "MIT, data Unicode-3.0",
    "emojibase, Miles Johnson; Unicode CLDR names, Unicode, Inc.",
)

_FONT_SHA256 = {
    "anton": "796d0b1b7a503636458c0869ef9993659411c86443a4e4e7555ead4b29293db4",
    "bangers": "7200b288ad26e3da1dd0a47dfb6f1712c4c327f038d84afe69a682c63a2c102c",
    "bebas-neue": "57928e0ee30b9e8a99033cdd5dc74ad06761007b4ad8fc32173e5d9072ba91fa",
    "caveat": "ebf746fc0667b9d10fcac7c8604e2ba40a264da85a1c9b48bd679c0af3221293",
    "comic-neue": "0d242660fa8a3e31deb4ba0005b830904db4533ae3366f9c41724ff452662fa6",
    "fredoka": "3826ef8182dca8bec112e8320cd42c4aaec1b4cad9f6a3a2eaa4c98ee7ece323",
    "inter": "02034af8d41dcc67ac8eab88f642e129bb8a2e8922abf30229c32725f54d8fd6",
    "lobster": "4ac6f6ab805b684026cb719f55dd605c892ca5d1db3f32fca88ca554a63b86d7",
    "luckiest-guy": "9016d71137f5a2df3c9edcfed8480da0ebeee31849a673ff833e4782ec2039a6",
    "oswald": "27bf46420288bb65bd186638cde54686aa8f9d5dc975b1d597dfe81a7dd472cb",
    "pacifico": "397f4f0a8a4c44e929cafa4cfede7240f7ac81a922f6779d3fefe2192c67d619",
    "press-start-2p": "7aa0c201772e5099e713f99ce4117c56ebdda85cb4d95b81f22922c13f655e37",
    "roboto-slab": "45d42c2f30be7fa361c673a297cb75e151e977a57905e449d25875adf97e77f5",
    "special-elite": "c4b33d38d9829a962bcb3fe8067ee8ce062c2a936e9e01fc072ddaf9cc897460",
}
FONT_PACKAGES: dict[str, Package] = {
    name: _npm(
        f"@fontsource/{name}",
        "5.3.0",
        sha256,
        "Apache-2.0" if name in ("luckiest-guy", "special-elite", "roboto-slab") else "OFL-1.1",
        f"font {name}, its authors",
    )
    for name, sha256 in _FONT_SHA256.items()
}
CJK_FONT_PACKAGE = Package(
    "fonts-wqy-microhei",
    "0.2.0-beta-3.1",
    "fonts-wqy-microhei_0.2.0-beta-3.1_all.deb",
    "239163df984eea5c9da3b551aee374936222cdbd67f1a1be3cdcf3d76143ad66",
    "Apache-2.0",
    "WenQuanYi Micro Hei",
    client="apt",
)

ALL_PACKAGES: tuple[Package, ...] = (
    *STICKER_PACKAGES.values(),
    NAMES_PACKAGE,
    *FONT_PACKAGES.values(),
    CJK_FONT_PACKAGE,
)


def fetch(package: Package, cache: Path) -> Path:
    """The package's file in `cache`, downloaded when absent; raises BadInput when its hash is not the pinned one."""
    path = cache / package.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        client = {"npm": "npm", "apt": "apt-get"}[package.client]
        if shutil.which(client) is None:
            raise MissingExtra(
                f"{package.name} {package.version} comes through '{client}', which is not installed; "
                f"install it, or put {package.filename} (sha256 {package.sha256}) into {cache}"
            )
        command = (
            ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
            if package.client == "npm"
            else ["apt-get", "download", f"{package.name}={package.version}"]
        )
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
        if package.client == "apt" and not path.exists():  # a new machine has no package lists yet
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
            done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
        if not path.exists():
            raise BadInput(f"'{' '.join(command)}' left no {package.filename}: {done.stderr.strip()[-400:]}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise BadInput(
            f"{path.name} has sha256 {found}, pinned is {package.sha256}: delete the file and fetch again; "
            "if it differs again the registry serves another file than the one this corpus was built from"
        )
    return path


def attribution() -> str:
    """The text that must travel with weights trained on the corpus: one line a package."""
    lines = [f"- {p.notice} ({p.name} {p.version}), {p.licence}" for p in ALL_PACKAGES]
    return "The pictures, names and fonts that the embedded model was trained on:\n\n" + "\n".join(lines) + "\n"
