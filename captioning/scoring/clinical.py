r"""Clinical agreement of captions without a license or a download: attributes read from the text.

    stated_attributes("CT of the chest: 3.5 cm mass in the left lung, no effusion")
    # {"modality": {"CT"}, "region": {"chest"}, "laterality": {"left"}, "negation": {"effusion"},
    #  "measurement": {"35"}}
    agreement(predictions, references)["laterality"].value     # F1, from 0 to 1

Words are looked up in the tables below, made for English captions as published, and as BLIP decodes them (lower case,
"x - ray", "3. 5 cm"). What is read is what a caption says, not what its image shows: words, not their meaning.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence, Set

import numpy as np

from captioning.scoring.bootstrap import Score


ATTRIBUTES = ("modality", "region", "laterality", "negation", "measurement")

# --- Words: regular expressions of a whole word, on lower-case text without accents ------------------------------

_MR_STUDY = (
    r"imag|scan|angio|veno|cholangio|spectro|arthro|entero|uro|stud|exam|sequence|slice|view|of the|show|reveal"
)
MODALITY = {
    "PET": (r"pet|positron emission|(?:18f?-?)?fdg",),
    # Of catheters only: CT and MR angiography are CT and MRI, and ROCOv2's modality classes agree
    "angiography": (
        r"(?<!tomography )(?<!tomographic )(?<!resonance )(?<!mr )(?<!mr-)(?<!ct )(?<!ct-)angiogra\w+",
        r"dsa|arteriogra\w+|aortogra\w+|phlebogra\w+|(?<!resonance )(?<!mr )(?<!ct )venogra\w+",
        r"ventriculogra(?:m|ms|phy)|cine-?angiogra\w+",
    ),
    "CT": (
        r"(?:hr|md|cb|ce|nc|cc|micro-?)?ct(?:a|s)?|cat(?= scan)",
        r"comput\w+(?: axial)?(?:-aided)? tomogra\w+|computed-tomogra\w+|comput\w+(?=-tomogra)",
    ),
    "MRI": (
        rf"(?:f|c|mp)?mris?|cmr|mr[av]|mrcp|mr(?=[ -](?:{_MR_STUDY}))|magnetic[ -]resonance",
        r"t[12][ -]?(?:w|wi|wis|weighted|weighed|flair|fse|tse|space|stir|fs)",
        r"flair|stir|dwi|diffusion[ -]weighted|gadolinium\w*",
    ),
    "ultrasound": (
        r"ultra-?so(?:und|no)\w*|sonogra\w+|us(?= (?:image|scan|exam|show|reveal|of the))",
        r"echo-?cardiogra\w+|echogra\w+|echo|doppler|t[te]e|(?:iv|e)us|[bm]-mode",
    ),
    # Projections of every kind: ROCOv2 has no class of its own for mammograms and fluoroscopy
    "X-ray": (
        r"x[ -]?rays?|radiogra(?:ph|m)\w*|ro?entgen\w*|cxr|kub|(?:plain|chest) films?|mammogra\w+",
        r"orthopantomogra\w+|opg|dpt|cephalogra\w+|fluorosco\w+|barium|upper gi|gastrografin",
        r"(?:cysto|urethro|cystourethro|uro|pyelo|myelo|fistulo|hysterosalpingo|esophago|oesophago)gra(?:m|ms|phy)",
        r"mcu|mcug|vcug|ivu|ivp|ercp|skiagram",
    ),
}
REGION = {
    "head": (
        r"(?<!femoral )(?<!humeral )(?<!radial )(?<!arrow )(?<!pancreatic )(?<!metatarsal )(?<!metacarpal )"
        r"heads?(?! of | and body)",
        r"skull|cranium|cranio(?!-?caud)\w+|cranial (?:nerve|fossa|vault|bone|ct|mr|comp|magn|base)\w*",
        r"(?:intra|extra)-?cranial|brains?|brainstem|midbrain",
        r"cerebr\w+|cerebell\w+|hemispher\w+|thalam\w+|hippocamp\w+|basal ganglia|pons|pontine|corpus callosum",
        r"pituitary|hypophys\w+|sellar?|suprasellar|cavernous sinus\w*|white matter|gr[ae]y matter|choroid plexus",
        r"(?:frontal|temporal|parietal|occipital)(?= (?:lobe|region|bone|horn|area|cortex|sinus|gyrus|mass|hemorr))",
        r"(?:fronto|temporo|parieto|occipito)-?(?:parietal|temporal|occipital|frontal|basal)|occipital",
        r"(?:lateral|third|fourth|3rd|4th|cerebral) ventricles?|hydrocephal\w+|subdural|subarachnoid|mening\w+",
        r"orbit(?:s|al)?|optic nerves?|eyes?|ocular|globe|nas(?:al|i)|naso(?:septal|ethmoid\w*)|paranasal|sinonasal",
        r"maxill\w+|mandib(?:le|ul)\w*|jaws?|zygoma\w*|facial|sphenoid\w*|ethmoid\w*|mastoid\w*|temporomandibular",
        r"teeth|tooth|(?:pre)?molars?|incisors?|dental|orthopantomogra\w+|opg|cochlea\w*|auditory|palat(?:e|al)",
        r"middle cerebral|circle of willis|scalp|clivus|pterygo\w+|tongue",
    ),
    "chest": (
        r"chests?|cxr|thorax|hemi-?thorax|intra-?thoracic|thoraco-?abdominal",
        r"(?<!trans)thoracic(?! (?:spin|vertebr|cord|level|region of the spin|kypho))",
        r"lungs?|pulmonary(?! (?:valve|steno))|intrapulmonary|pleur\w+|mediastin\w+|hil(?:ar|um) (?:lymph|aden)\w*",
        r"bronch\w+|pneumo(?:thora\w+|nia|mediastinum|nitis)|hydro-?pneumothora\w+",
        r"(?:pneumo-?)?ha?emo-?thora\w+|empyema",
        r"ribs?|stern(?:um|al)|lingula\w*|middle lobe|hemi-?diaphragm\w*|costophrenic|cardiothoracic",
    ),
    "heart": (
        r"hearts?|cardi(?:ac|omegaly|omyopathy)|echo-?cardiogra\w+|intracardiac|myocard\w+|endocard\w+",
        r"(?:hemo)?pericardi\w+|atri(?:um|a|al)|interatrial|interventricular|biventricular|mitral|tricuspid",
        r"(?:left|right) ventric\w+|ventricular (?:septal|septum)|(?:aortic|pulmonary) valves?",
        r"coronar(?:y|ies)|[lr]v(?:ot)?",
    ),
    "breast": (r"breasts?", r"mammogra\w+", r"(?<!internal )mammary"),
    "abdomen": (
        r"abdom\w+|intra-?abdom\w+|thoraco-?abdominal|liver|(?:intra|extra)?-?hepat(?:ic|o)\w*|hepatitis",
        r"spleen|splen(?:ic|omegaly)|(?:peri)?pancrea\w+|kidneys?|(?:peri|supra|infra|ad|pararenal)?-?renal|nephr\w+",
        r"hydro-?nephro\w+|gall-?bladder|gall bladder|bil(?:e|iary)|cholecyst\w+|choledoch\w+|cholangio\w+|stomach",
        r"gastric|duoden\w+|jejun\w+|ile(?:um|al|us)|ileo\w+|colon(?:ic|ogra\w+)?|colitis|ca?ec(?:um|al)|intestin\w+|bowels?",
        r"appendi(?:x|ci\w+|ceal)|mesenter\w+|(?:retro|intra)?-?perito?n\w+|ureter(?:s|ic|al)?|celiac|omental|omentum",
        r"portal (?:vein|venous)|kub|flanks?|subphrenic|porta hepatis",
    ),
    "pelvis": (
        r"(?<!renal )pelvi[sc]|hemi-?pelvis|uter(?:us|ine)|ovar(?:y|ies|ian)|(?<!gall )bladder|prostat\w+",
        r"(?:peri|ano)?-?rect(?:um|al)|vagina\w*|adnexa\w*|endometri(?:um|al)|myometri\w+|scrot(?:um|al)",
        r"testi(?:s|c\w+|s)|testes|hips?|acetabul\w+|ischi(?:um|al)|pub(?:is|ic)|sacro-?iliac|sacr(?:um|al)|coccyx",
        r"ili(?:ac|um)|urethr(?:a|al|ogram)|c(?:o)?ysto-?(?:urethro)?gra\w+|cervix|cervical (?:canc|carc)\w+|penile",
        r"inguinal|groins?",
    ),
    "spine": (
        r"(?<!iliac )(?<!scapular )spines?|spinal|vertebra(?:e|l(?! arter))?|inter-?vertebral|paravertebral",
        "paraspinal",
        r"(?:thoraco|dorso)?-?lumbar|lumbo-?sacral|spondyl\w+|scolio\w+|kypho\w+|odontoid|atlanto-?\w+|myelogra\w+",
        r"l[1-5][-/](?:l?[2-5]|s1)|c[2-7][-/]c?[3-7]|t\d{1,2}[-/]t?\d{1,2}",
    ),
    "neck": (
        r"(?<!femoral )(?<!bladder )(?<!humeral )(?<!radial )(?<!surgical )(?<!anatomical )(?<!aneurysm )(?<!wide )"
        r"necks?(?! of )",
        r"(?:para)?thyroid\w*|(?:naso|oro|hypo|para|retro)?-?pharyn\w+|laryn\w+|(?:epi|supra|sub)?glotti\w+",
        r"jugular|common carotid|carotid (?:bifurcation|sheath|bulb)|submandibular|parotid|hyoid|tonsil\w*",
        r"cervical(?! (?:canc|carc|vagin|os\b|intraep|spin|vertebr|cord|disc|syrin|myel|kypho|lordo))",
    ),
    "upper limb": (
        r"upper (?:limb|extremit)\w*|arms?|forearms?|elbows?|wrists?|fingers?|thumbs?|shoulders?|clavic\w+",
        r"(?<!other )(?<!right-)(?<!left-)hands?(?![ -]side)|humer(?:us|al|i)|(?:distal|proximal) radi(?:us|al)",
        r"radial heads?|radius and ulna|ulnar?|carpal|metacarp\w+|scaphoid|lunate|scapula\w*|glen(?:oid|ohumeral)",
        r"acromio\w*|rotator cuff|supraspinatus|brachial",
    ),
    "lower limb": (
        r"lower (?:limb|extremit)\w*|legs?|thighs?|knees?|femur|femora|femoral|tibi(?:a|al|as)|tibio\w+|fibul\w+",
        r"patell\w+|ankles?|foot|feet|toes?|calcan\w+|tal(?:us|ar|onavicular)|metatars\w+|tarsal|menisc\w+|cruciate",
        r"malleol\w+|perone(?:al|us)|achilles|popliteal|heels?|hallux|calf|calves",
    ),
}
# Where "left" and "right" are not a side of the patient: layout of the figure, arrows, projections, the verb "leave"
_LAYOUT = (
    r"arrow\w*|panels?|images?|pictures?|figures?|photo\w*|columns?|curves?|rows?|corner|inset|frame|star|asterisk"
)
_BETWEEN = (
    r"upper|lower|top|bottom|most|side|small|big|large|thick|thin|short|long|white|black|red|blue|green|yellow|orange"
    r"|open|solid|curved|dotted|dashed|hand|hand side"
)
_NO_SIDE_AFTER = (
    rf"(?![ -](?:(?:{_BETWEEN})[ -])*(?:{_LAYOUT})\b|[ -]?(?:side|part|half) of (?:the|each|this) (?:{_LAYOUT}|screen)"
    r"|[ -](?:anterior|posterior) oblique|[ -]lateral (?:decubitus|view|radio|x|chest|proj)|[ -]to[ -](?:right|left)\b"
    r"|[ -](?:after|before|now|away|angle\w*|handed|untreated|alone|behind|unrepaired|open\b|in (?:place|situ)|over\b)"
    r"|\s*[:=])"
)
_NO_SIDE_BEFORE = "".join(
    rf"(?<!{word} )"
    for word in ("top", "bottom", "was", "were", "been", "had", "right to", "left to", "image on the", "figure on the")
) + "".join(rf"(?<!{word}-to-)" for word in ("right", "left"))
_PAIRED = (
    r"lungs?|kidneys?|sides?|hips?|knees?|breasts?|lobes?|femurs?|femora|femoral|legs?|feet|hands?|eyes?|orbits?|hila"
    r"|ovar(?:y|ies)|adrenals?|hemispher\w+|shoulders?|ureters?|thalam\w+|hemithora\w+|ankles?|maxill\w+|testes"
)
LATERALITY = {
    "left": (rf"{_NO_SIDE_BEFORE}left{_NO_SIDE_AFTER}",),
    "right": (rf"{_NO_SIDE_BEFORE}right{_NO_SIDE_AFTER}",),
    "bilateral": (r"bilat\w*", rf"both(?: the)?(?: \w+)? (?:{_PAIRED})"),
}


def _compile(words: dict[str, Sequence[str]]) -> tuple[re.Pattern, tuple[str, ...]]:
    """Return one pattern with a group per value, in the order of the values."""
    groups = "|".join(f"({'|'.join(fragments)})" for fragments in words.values())
    return re.compile(rf"(?<![a-z0-9])(?:{groups})(?![a-z0-9])"), tuple(words)


_READERS = {"modality": _compile(MODALITY), "region": _compile(REGION), "laterality": _compile(LATERALITY)}

# --- Negation: the triggers of NegEx that captions use (Chapman et al., J Biomed Inform 34:301, 2001) ----------

_SHOWN = (
    r"(?:seen|visible|visuali[sz]ed|identified|detected|observed|noted|present|found|demonstrated|demonstrable|evident"
    r"|apparent|depicted|appreciated|recogni[sz]ed|perceived)"
)
_SIGNS = r"(?:\w+ )?(?:evidence|signs?|features|indications?) (?:of|for)"
_BEFORE = re.compile(
    r"\b(?<![-.])(?:(?:no|without)(?! (?:longer|more|change|changes|only)\b)(?![-.:])(?: (?:any|further))?"
    r"|(?:absence|lack) of|absent|negative for|free of|neither|(?:ruled|ruling|rules|rule) out|exclud\w+(?= an?y?\b)"
    rf"|(?:does|do|did) not (?:show|reveal|demonstrate)|not (?:showing|revealing|demonstrating)|lacking)(?: {_SIGNS})?"
    r"(?: |$)"
)
_AFTER = re.compile(
    rf"\b(?:(?:(?:is|are|was|were|could|can|has|have)(?: be| been)? )?(?:not|no longer|never)"
    rf"(?: be| been)?(?: \w+ly)? {_SHOWN}|cannot be {_SHOWN}"
    r"|(?:is|are|was|were) (?:absent|excluded(?! from)|ruled out))\b"
)
_SCOPE = 6  # words after a trigger that it can negate, as in NegEx
# Words that end the noun phrase that names a finding
_STOP = re.compile(
    r"in|on|of|at|with|within|from|to|for|by|after|before|during|between|along|around|into|through|near|over|under|or"
    r"|and|nor|but|however|although|though|except|despite|while|whereas|which|that|this|these|those|who|where|when|as"
    r"|than|is|are|was|were|be|been|being|has|have|had|can|could|may|due|because|since|if|then|also|only|it|its|there"
    r"|seen|noted|visible|identified|found|present|observed|detected|demonstrat\w+|show\w*|reveal\w*|display\w*"
    r"|confirm\w*|suggest\w*|indicat\w+|consistent|associated|involving|causing|following|compatible|compared"
    r"|extending|arising|secondary|caused|occurred|occurring|surrounding|requiring|related|prior|suitable"
    r"|obtained|continuing|presents|results"
)
_DETERMINERS = frozenset(("a", "an", "the", "any", "other", "further", "obvious", "apparent"))
# Not heads where they end the phrase: "no flow distal to", "no residual or recurrent disease"
_ADJECTIVES = re.compile(
    r"distal|proximal|lateral|medial|anterior|posterior|elsewhere|outside|anywhere|residual|recurrent|new|local|acute"
    r"|active|focal|left|right|bilateral\w*|primary|clear|definite|significant|intravenous|iv|oral|free|else|well"
    r"|yet|more|beyond|\w+ly"
)
# "Without contrast" says how an image was made, not what is absent from it
_NO_FINDING = re.compile(
    r"contrast|gadolinium|injection|agents?|medium|material|administration|use|need|history|complications?|time|case"
    r"|patients?|symptoms?|changes?|difference|way|one|doubt|success|assumptions?|surgery|treatment|evidence|signs?"
)
_WORD = re.compile(r"[a-z][a-z0-9'/-]*|\d+|[,.;:()]")
_CLAUSE_START = re.compile(r"[,.;:()]|\b(?:and|but|while|which|that|where|with|showing|shows?)\b")


def _singular(word: str) -> str:
    for ending, singular in (("ies", "y"), ("eses", "esis"), ("ases", "asis"), ("oses", "osis"), ("sses", "ss")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return word[: -len(ending)] + singular
    return word[:-1] if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")) else word


def _ends(word: str) -> bool:
    return not word[0].isalpha() or _STOP.fullmatch(word) is not None


def _head(words: Sequence[str]) -> str | None:
    """Return the last noun, singular, of the phrase that `words` begin with; None if it does not name a finding."""
    phrase = [word for word in itertools.takewhile(lambda word: not _ends(word), words) if word not in _DETERMINERS]
    while phrase and _ADJECTIVES.fullmatch(phrase[-1]):
        phrase.pop()
    if not phrase or len(phrase[-1]) < 3 or _NO_FINDING.fullmatch(phrase[-1]):
        return None
    return _singular(phrase[-1])


def _negated_after(text: str) -> list[str | None]:
    """Return the heads of the findings that the beginning of `text` lists: "fracture, dislocation or effusion in"."""
    words = [*_WORD.findall(text[:160]), "."]
    heads, start = [], 0
    for position, word in enumerate(words):
        joins = word in (",", "and", "or", "nor")
        if not joins and not _ends(word) and position - start < _SCOPE:
            continue
        if position > start:
            heads.append(_head(words[start:position]))
        following = words[position + 1 : position + 2 + _SCOPE]
        # A comma continues the list only if an "or" closes it; "and a" and "and the" begin something else
        end = next((other for other in following if other != "," and _ends(other)), None)
        closed = word != "," or following[0] == "and" or end in ("or", "nor")
        if not joins or not closed or (word in (",", "and") and following[0] in ("a", "an", "the", "normal")):
            break
        start = position + 1
    return heads


def _negations(text: str) -> set[str]:
    heads = {head for match in _BEFORE.finditer(text) for head in _negated_after(text[match.end() :])}
    for match in _AFTER.finditer(text):  # of a clause: "the fistulous tract to the anorectum" [is not seen]
        clause = _CLAUSE_START.split(text[: match.start()][-100:])[-1]
        heads.add(_head(_WORD.findall(clause)))
    return heads - {None}


# --- Measurement: lengths in millimeters ---------------------------------------------------------------------------

# "3. 5" is how BLIP's tokenizer decodes "3.5"
_NUMBER = r"\d{1,3} ?[.,] ?\d{1,2}|\d{1,4}"
_LENGTH = re.compile(
    rf"(?<![\w.,])((?:{_NUMBER})(?: ?(?:x|\*|by|-|/|to|and) ?(?:{_NUMBER})){{0,2}})"
    r"[ -]{0,2}(mms?|cms?|millimet\w+|centimet\w+)(?![\w/^]| ?hg\b| h2o| ?2\b| ?3\b)"
)
# Words before and after lengths of the scan or of the printed figure, which are not lengths in the patient
_TECHNIQUE = re.compile(
    r"\b(?:slices?|sections?|slab|field of view|fov|collimation|scale|bar|interval|spacing|pixel|voxel)\b"
)
_TECHNIQUE_AFTER = re.compile(
    r"[ -](?:\w+[ -])?(?:slices?|sections?|mip|fov|collimation|tomograms?)\b| \(\d+ ?x ?\d+ dpi"
)
TOLERANCE = 0.1  # of the larger length: about what rounding to half a centimeter or moving the calipers changes


def _measurements(text: str) -> set[str]:
    lengths = set()
    for match in _LENGTH.finditer(text):
        before = text[max(0, match.start() - 25) : match.start()]
        if _TECHNIQUE.search(before) or _TECHNIQUE_AFTER.match(text, match.end()):
            continue
        scale = 10 if match[2].startswith("c") else 1
        for number in re.findall(_NUMBER, match[1]):
            millimeters = scale * float(number.replace(" ", "").replace(",", "."))
            lengths |= {f"{millimeters:g}"} if millimeters > 0 else set()
    return lengths


# --- Reading a caption ---------------------------------------------------------------------------------------------

# Published captions lack the space after a title: "scanThe mass"
_GLUED = re.compile(r"(?<=[a-z]{2})(?=[A-Z][a-z]{2})")


def plain_text(caption: str) -> str:
    """Return `caption` as the tables are written: lower case, no accents, one kind of dash."""
    caption = _GLUED.sub(" ", caption)
    if not caption.isascii():
        caption = unicodedata.normalize("NFKD", caption)
        caption = "".join(c for c in caption if not unicodedata.combining(c))
        caption = re.sub(r"\s*[–—]\s+", ", ", caption)  # a dash between clauses, not within a word
        caption = caption.translate({ord(c): "-" for c in "–—−‐‑‒"} | {ord("×"): "x", ord("’"): "'"})
    # "x - ray", as BLIP decodes it, becomes "x-ray"
    return re.sub(r" ?([-/]) ?", r"\1", " ".join(caption.lower().split()))


def _mentions(attribute: str, text: str) -> list[str]:
    pattern, values = _READERS[attribute]
    return [values[match.lastindex - 1] for match in pattern.finditer(text)]


# Cached because baselines repeat captions, and each system is compared with the same references
@functools.lru_cache(maxsize=2**15)
def stated_attributes(caption: str) -> dict[str, frozenset[str]]:
    """Return what `caption` states of each of `ATTRIBUTES`; an empty set where it states nothing.

    `modality`, `region` and `laterality` have keys of the tables `MODALITY`, `REGION` and `LATERALITY`; `negation` has
    the nouns of the findings that are said to be absent, lower case and singular; `measurement` has lengths in
    millimeters, as text: "35", "12.5".
    """
    text = plain_text(caption)
    found = {name: frozenset(_mentions(name, text)) for name in _READERS}
    return found | {"negation": frozenset(_negations(text)), "measurement": frozenset(_measurements(text))}


# --- Agreement -----------------------------------------------------------------------------------------------------


def micro_f1(sums: np.ndarray, number: int) -> np.ndarray:
    """Return the F1 `[...]` of `[..., 3]` common, predicted and stated items; NaN where there are none of either."""
    items = np.asarray(sums[..., 1] + sums[..., 2], float)
    return np.divide(2 * sums[..., 0], items, out=np.full(items.shape, np.nan), where=items > 0)


def _same_lengths(predicted: Set[str], stated: Set[str]) -> int:
    """Return how many lengths can be paired, one to one, that differ by at most `TOLERANCE`.

    In ascending order each length is paired with the smallest near enough one of the other side. That is optimal: what
    is too small for this length is too small for all that follow.
    """
    ours, theirs = sorted(map(float, predicted)), sorted(map(float, stated))
    i = j = pairs = 0
    while i < len(ours) and j < len(theirs):
        if abs(ours[i] - theirs[j]) <= TOLERANCE * max(ours[i], theirs[j]) + 1e-9:
            i, j, pairs = i + 1, j + 1, pairs + 1
        elif ours[i] < theirs[j]:
            i += 1
        else:
            j += 1
    return pairs


def agreement(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """Return the micro F1 of the (caption, value) items of each attribute, see `item_agreement`.

    Raises:
        ValueError: there are not as many predictions as references.
    """
    said, stated = ([stated_attributes(text) for text in texts] for texts in (predictions, references))
    return {
        name: item_agreement(name, [items[name] for items in said], [items[name] for items in stated])
        for name in ATTRIBUTES
    }


def item_agreement(attribute: str, predicted: Sequence[Set[str]], stated: Sequence[Set[str]]) -> Score:
    """Return the micro F1 of the items of an attribute in N captions, from 0 to 1.

    Its statistics are `[N, 3]`: how many items both captions state, the prediction, the reference. Its value is NaN
    where neither side ever states any, which is neither agreement nor a lack of it.

    Raises:
        ValueError: there are not as many predictions as references.
    """
    both = _same_lengths if attribute == "measurement" else lambda a, b: len(a & b)
    rows = [(both(ours, theirs), len(ours), len(theirs)) for ours, theirs in zip(predicted, stated, strict=True)]
    return Score(np.array(rows, float).reshape(-1, 3), micro_f1)


def item_counts(score: Score) -> dict[str, float | int | None]:
    """Return precision and recall behind an F1 of `item_agreement`, and how many items were predicted and stated."""
    common, predicted, stated = score.statistics.sum(axis=0)
    return {
        "precision": common / predicted if predicted else None,
        "recall": common / stated if stated else None,
        "predicted": int(predicted),
        "stated": int(stated),
    }


# --- The modality of an image --------------------------------------------------------------------------------------

# The first one of an image counts, so the more specific come first: a PET comes with a CT, an angiogram is made of
# X-rays, and a combined image takes the modality with more contrast of soft tissue.
UNKNOWN = "unknown"
MODALITY_CUIS = {
    "C0032743": "PET",
    "C0002978": "angiography",
    "C0024485": "MRI",
    "C0040405": "CT",
    "C0041618": "ultrasound",
    "C1306645": "X-ray",
}


def modality_of(cuis: Sequence[str], caption: str) -> str:
    """Return an image's modality, a key of `MODALITY`, or `UNKNOWN`, which is no class.

    It is the first of `MODALITY_CUIS` among its `cuis`, else the first that its `caption` names.
    """
    known = [modality for cui, modality in MODALITY_CUIS.items() if cui in set(cuis)]
    return next(iter(known or _mentions("modality", plain_text(caption))), UNKNOWN)
