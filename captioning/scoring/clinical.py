r"""Clinical agreement of captions without a license or a download: attributes read from the text.

    stated_attributes("CT of the chest: 3.5 cm mass in the left lung, no effusion")
    # {"modality": {"CT"}, "region": {"chest"}, "laterality": {"left"}, "negation": {"effusion"},
    #  "measurement": {"35"}}
    agreement(predictions, references)["laterality"].value     # F1, from 0 to 1

Words are looked up in the tables below, made for English captions as published, and as BLIP decodes them (lower case,
"x - ray", "3. 5 cm"). What is read is what a caption says, not what its image shows: `docs/metrics.md` defines the
labels and says how often the readers are right.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence, Set

import numpy as np

from captioning.scoring.bootstrap import Score


ATTRIBUTES = ("modality", "region", "laterality", "negation", "measurement")

# --- Words: regular expressions of whole words, on lower-case text without accents; "_" is a space ---------------

# A CT angiogram is a CT and an MR cholangiogram an MRI, and ROCOv2's modality classes agree
_STUDY = r"(?:[_-](?:(?!and_|or_|with_)\w+[_-]){0,2}?(?:\w*(?:angio|veno|rio|uro|myelo|arthro)gra|fluorosco)\w+)?"
MODALITY = {
    "PET": r"pet positron_emission (?:18f?-?)?fdg \w*fluoro-?\w*-?deoxy\w*",
    # Of catheters, not of the eye
    "angiography": r"""(?:cine-?|(?<!tomography_)(?<!fluorescein_)(?<!green_))angiogra\w+ dsa (?:arterio|aorto)gra\w+
        (?:phlebo|veno|cavo|ventriculo)gra(?:m|ms|phy) digital_subtraction""",
    "CT": rf"""
        (?:(?:hr|q|md|ms|ld|cb|ce|ne|nc|cc|micro-?)?ct[acs]?|comput\w+(?:_axial)?(?:-aided)?[_-]tomogra\w+){_STUDY}
        c\._?t(?=[.:]) c_t(?=_scan) cat(?=_scan)""",
    "MRI": rf"""
        (?:[fcm]?p?mris?|magnetic[_-]resonance|mr(?=[_-](?:angio|veno|uro|arthro|cholangio)))(?:_imag\w+)?{_STUDY} cmr
        mr[av] mrcp mr(?<=brain_mr) flair stir [ds]wi dti ssfp gre fiesta haste f?spgr steady[_-]state_free
        mr(?=[_-](?:imag|scan|spectro|entero|stud|exam|sequence|slice|view|of_the|show|reveal|demonstr|axial|coronal))
        t[12][_-]?(?:w|wi|wis|a|weighted|weighed|flair|fse|tse|space|stir|fs) (?:diffusion|susceptibility)[_-]weighted
        (?:gradient|spin|field|stimulated)[_-]echo [tf]se tractogra\w+ gadolinium\w* proton[_-]density""",
    "ultrasound": r"""ultra-?so(?:und|no|nic)\w* (?:endo)?sonogra\w+ us(?=_(?:image|scan|exam|show|reveal|of_the)) usg
        us(?<=or_us) us(?<=scale_us) echo-?cardiogra\w+ echogra\w+ echo(?!-planar|_planar|_time|_train) doppler duplex
        t[te]e (?:iv|e)us [bm]-mode ceus ubm""",
    # Projections of every kind: ROCOv2 has no class of its own for mammograms and fluoroscopy
    "X-ray": r"""x[_-]?rays? (?:ortho|tele)?radiogra(?:ph|m)\w* (?:ortho)?ro?ent(?:gen|o)\w* [ca]?xr kub
        (?:plain|chest|abdom\w+|supine|upright|erect|ap)_films? mammogra\w+ skiagram (?:ortho)?pant(?:om)?ogra\w+
        opg panorex dpt cephalogra\w+ fluorosco\w+ barium upper_gi gastrografin iopar? rvg [mv]cug? iv[up]
        (?:(?:urethro)?cysto|(?:cysto)?urethro|uro|pyelo|myelo|fistulo|sino|hysterosalpingo|o?esophago)gra(?:m|ms|phy)
        (?:cholangio|nephrosto|sialo|arthro|dacryocysto|lymphangio|galacto|defeco|disco|colo)gra(?:m|ms|phy) ercp hsg
        retrograde_cholangio\w+""",
}
# What belongs to one modality only; read where no modality is named
IMPLIED_MODALITY = {
    "MRI": r"""(?:hyper|hypo|iso)-?intens\w+ t(?<=in_t)[12] t(?<=on_t)[12] (?:axial|coronal|sagittal)_t[12]
        t[12](?=_(?:hyper|hypo|axial|coronal|sag|imag|seq|fat)) tesla adc phase-contrast""",
    "ultrasound": r"""(?:hypo|hyper|iso|an)-?echo(?:ic|genic)\w* echo(?:ic|genic\w*|texture) transducer
        e?-?fast(?=_(?:view|exam|scan)) (?:parasternal|subcostal|suprasternal)(?=_(?:[\w-]+_){0,4}view)
        apical_(?:two|three|four|five|[2-5])[_-]chamber""",
    "CT": r"hounsfield \d+_?hu (?:hypo|hyper)-?(?:dens|attenuat)\w+ (?<!coherence_)(?<!emission_)(?:angio)?tomogra\w+",
    "X-ray": r"""radio-?(?:lucen|opa[qc])\w+ image_intensifier
        (?:antero|postero|anterior|posterior)-?(?:posterior|anterior)_(?:view|proj)\w* [ap][ap]_(?:view|projection)
        panoramic(?!_(?:ultra|sono)) peri-?apical cobb (?:cranio-?caudal|mediolateral)(?:_oblique)?_views?""",
    "angiography": r"""timi [lr]ao (?:left|right)_anterior_oblique
        (?:cardiac|heart|selective|diagnostic)_catheteri[sz]ation""",
}
# Before any word of a region, but for "trans-" and "endo-", which tell the way in
_PREFIX = r"(?:(?:peri|para|pre|retro|sub|supra|infra|inter|intra|extra|meso|hemi|bi|ad|pneumo|ha?emo|hydro)-?){0,2}"
REGION = {
    "head": r"""head(?<!arrow_head)s?(?!_of_|_and_body|-down|-neck) skulls? crani(?:um|o(?!-?caud)\w+) calvari\w+ scalp
        clivus pterygo\w+ (?:posterior|middle)_fossa cranial(?=_(?:nerve|fossa|vault|bone|ct|mr|comp|magn|base))
        cranial(?<=intracranial) cranial(?<=extracranial) sphenoid\w* ethmoid\w* brain(?:s|-?stem)? midbrain
        mesenceph\w+ cerebr\w+ cerebell\w+ hemispher\w+ (?:hypo)?thalam\w+ hippocamp\w+ pons pontine basal_ganglia
        corpus_callosum callosal putamen lenti(?:form|cular)(?=_nucl) striatum vermis substantia_nigra
        centrum_semiovale caudate(?!_lobe) pallidus internal_capsule medulla_oblongata (?:cervico|bulbo)-?medullary
        gyr(?:us|i) sulc(?:al|i) central_sulcus mca sylvian tentori\w+ amygdala\w* (?:neuro)?hypophys\w+ pituitary
        sellar? pineal choroid_plexus ventricular(?<=periventricular) ventricular(?<=intraventricular)(?!_sept)
        (?:lateral|third|fourth|3rd|4th|cerebral)_ventricles? (?:white|gr[ae]y)_matter cephalus
        dura(?<!intradura)(?<!extradura)l?(?!_sac) arachnoid mening\w+ cistern(?:s|al)? (?:an|por)?encephal\w+ aqueduct
        glio(?:ma|blast)\w* basilar_(?:art|tip|trunk|invag)\w* tmj face(?<!interface)(?<!de_face) facial
        (?:frontal|temporal|parietal|occipital)(?=_(?:lobe|region|bone|horn|area|cortex|gyrus|mass|hem|fossa|art|musc))
        occipital temporalis (?:fronto|temporo|parieto|occipito)-?(?:parietal|temporal|occipital|frontal|basal)\w*
        circle_of_willis masseter internal_carotid ica carotid[_-](?:cavern\w+|siphon)
        (?:anterior|posterior)_communicating (?:acoustic|vestibular)_\w+oma
        (?:sagittal|transverse|sigmoid|venous|dural|cavernous|frontal|maxillary)_sinus\w* sinuses(?!_of|_tract)
        sinusitis orbit(?:s|al)? retina[le]? cataract cornea\w* irido\w+ iris pupil\w* vitre\w+ macula\w* fovea\w*
        choroid(?:al)? sclera\w* globe ocular optic ophthalm\w+ eye(?:s|balls?)? bulbar(?<=retrobulbar) conjunctiv\w+
        glaucoma anterior_chamber nas(?:al|i) naso(?!phar|gast|jej|duo|ent)\w+ nose turbinates? concha lacrimal
        dacryo\w+ mesi(?:al|o\w+) sinonasal ears? mastoid\w* tympan\w+ petrous petrosal cochlea\w* auditory maxill\w+
        mandib(?<!submandib)(?:le|ul)\w* jaws? zygoma\w* temporomandibular palat(?:e|al) tongue mouth teeth tooth
        (?:pre|disto)?molars? incisors? canines? dent(?:al|in\w*|ition) (?:ortho)?pant(?:om)?ogra\w+ opg panorex iopar?
        panoramic(?!_(?:ultra|sono)) apical(?<=periapical) bite-?wing enamel pulp\w* cephalo(?:gra|metr)\w+
        (?:endo|ortho)dont\w+ odont(?!oid)\w+ root_canals? gingiv\w+ ranula mylohyoid olfactory stape\w+ ependym\w+
        coloboma fluorescein rvg obturation oral(?<=intraoral) oral(?<=intra-oral) oral_cavity buccal
        occlusal(?=_(?:radio|view|x)) alveolar_(?:bone|ridge|crest|process)""",
    "chest": r"""chests? cxr thora(?:x|co(?!lumbar)\w+|ces)
        thorac(?:ic|al)(?!_(?:spin|vertebr|cord|level|region_of_the_spin|kypho|disc)) lungs?
        pulmonary(?!_(?:valve|steno)) pleur\w+ pneumo(?:nia|nitis) mediastin(?!um_testis)\w+ (?:endo|tracheo)?bronch\w+
        hila (?:peri)?hil(?:ar|um)(?=_(?:lymph|aden|mass|opac|enlarg|region|node|area)) trachea\w* tracheo(?!s?to)\w+
        carina\w* empyema thym(?:us|ic|oma) (?<!trans-)(?<!mid-)o?esophag\w+ ribs? costal(?<!subcostal) costo\w+
        cardiothoracic stern(?:um|otomy|oclav\w+) sternal(?<!parasternal)(?<!suprasternal) diaphragm\w* lingula\w*
        (?:upper|middle|lower)_lobes?(?!_of_(?:the_)?(?:thyr|liver)) [lr][uml]l subclavian azyg\w+ pectoral\w+
        alveolar_(?:infil|hemo|opac)\w+ aortic_arch arch_of_the_aorta (?:ascending|descending)_aorta svc
        superior_venae?_cava innominate brachio-?cephalic""",
    "heart": r"""hearts? dextrocardia cardi(?<!cm_cardi)(?:ac|omegaly|omyopathy) echo-?cardiogra\w+
        (?:epi|endo|myo)?card(?:ium|ial|itis|iocent\w+) atri(?:um|a|al|o\w+) sinus_of_valsalva
        ventricular(?<=interventricular) ventricular(?<=biventricular) mitral tricuspid bicuspid leaflets?
        papillary_muscles? cmr asd vsd (?:left|right)_ventric\w+(?!_system)
        ventricular(?<!lateral_ventricular)_(?:sept\w+|outflow) (?:aortic|pulmonary)_(?:valv\w+|regurg\w+)
        (?:aorto)?coronar(?:y|ies) septal_(?:defect|wall|leaflet|hyper\w+)
        aortic_(?:root|annul\w+|cusp|steno\w+|insuff\w+) [lr]v(?:ot)? lad rca lcx ccta t[te]e circumflex
        obtuse_marginal parasternal(?!_(?:mass|lymph|region)) (?:two|three|four|five|[2-5])[_-]chamber""",
    "breast": r"""breasts? mammogra\w+ mammary(?<!internal_mammary) nipples? fibroadenoma ductal_carcinoma dcis
        areol\w+ mastectom\w+""",
    "abdomen": r"""abdom\w+ thoraco-?abdominal axr aaa caudate_lobe liver hepat(?:ic|o)\w* hepatitis spleen splen\w+
        pancrea\w+(?:_(?:head|neck)s?)? kidneys? renal nephr\w+ gall[_-]?(?:bladder|stone)s?(?:_neck)? bile bili\w*
        chole(?:cyst|doch|lith)\w+ cholangio\w+ stomach gastr(?:ic|itis) gastro(?!cnem|grafin)\w+ duoden\w+ pylor\w+
        gist urolith\w+ volvulus urogra\w+ jejun\w+ ile(?:um|al|us) ileo\w+ entero(?:cl|gr)\w+ colon(?:ic|ogra\w+)?
        colic colitis colo(?:rect|st)\w+ colectomy ca?ec(?:um|al) sigmoid(?!_sinus) intestin\w+ bowels?
        appendi(?:x|ci\w+|ceal) (?:aorto)?mesenter\w+ diverticulitis intussuscept\w+ enema perito?n\w+ ascites
        ureter\w* pyelo\w+ caly(?:x|c\w+) pelvi-?caly\w+ c?oeliac celiac oment(?:al|um)
        portal_(?:vein|venous|thromb|hypert)\w* porta_hepatis kub iv[up] flanks? phrenic(?<=subphrenic) epigastr\w+
        psoas iliopsoas (?:right|left)_(?:upper|lower)_quadrant umbilic(?:al|us)(?!_(?:cord|art|vein|ven))
        urach(?:al|us) cardia rectus_(?:sheath|abd\w+) inferior_venae?_cava ivc ercp mrcp cystic_duct""",
    "pelvis": r"""pelvi(?<!renal_pelvi)[sc] uter(?:us|ine|o\w+) ovar(?:y|ies|ian) bladder(?<!gall_bladder)(?:_neck)?
        prostat\w+ cervix buttocks? glute\w+ (?<!trans-)(?<!endo-)(?:ano)?rect(?:um|al|o\w+) anal anus vagina\w*
        adnexa(?<!orbital_adnexa)\w* endometri\w+ myometri\w+ adenomyosis hydrometr\w+ douglas fallopian tubal
        (?:hystero)?salpin\w+ hsg perine(?:um|al) scrot(?:um|al) test(?:is|ic\w+|es) epididym\w+ (?:hydro|varico)cele
        penile penis urethr\w+ vesic(?:al|o\w+) placent\w+ gestational_sacs? umbilical_(?:cord|art\w+|vein) amniotic
        hips? acetabul(?:um|ar|a) ischi(?:um|al|o\w+) pub(?:is|ic) coccyx sacr(?:um|al|o-?\w+) ili(?:ac|um)
        c(?:o)?ysto-?(?:urethro)?gra\w+ cervical_(?:canc|carc)\w+ inguin\w+ groins?""",
    "spine": r"""spine(?<!iliac_spine)(?<!scapular_spine)(?<!nasal_spine)(?<!tibial_spine)s? spinal spinous
        vertebra(?:e|l)?(?!_arter) thecal end-?plates? spina_bifida pars_interart\w+ t1[0-2]
        [cl][1-7](?=_(?:nerve|root|level|screw|lamin|fract|corp)) transverse_process(?:es)? conus(?=_medull)
        (?:thoraco|dorso)?-?lumbar(?!_ureter) lumbo-?sacral spondyl\w+ scolio\w+ kypho\w+ lordo\w+ odontoid
        atlanto-?\w+ cauda_equina facet(?=_(?:joint|arthr|hyper))
        dis(?<!optic_dis)[ck]s?(?=_(?:hern|prot|prol|space|bulg|deg|height|extr))
        myelo(?:pathy|gra\w+|mening\w+|malacia) myelitis syrin\w+ laminectomy pedicle_screws? l[1-5][-/](?:l?[2-5]|s1)
        c[1-7][-/]c?[2-7] t\d{1,2}[-/]t?\d{1,2} [tcl]\d{1,2}_(?:to|through)_[tcl]\d{1,2}""",
    "neck": r"""neck(?<!rysm_neck)(?<!wide_neck)(?<!head-neck)s?(?!_of_|[_-]shaft) thyro(?!globul|xin)\w+
        (?:naso|oro|hypo)?-?pharyn\w+ laryn\w+ (?:epi)?glotti\w+ jugular ijv vertebral_arter\w+ submandibular
        carotid(?<!internal_carotid)(?<!cavernous_carotid)s?(?![_-](?:cavern|siphon)) submental parotid\w* salivary
        sialo\w+ hyoid (?:adeno)?tonsil(?<!cerebellar_tonsil)\w* adenoids? vocal_(?:cord|fold)s? arytenoid\w*
        cricoid\w* goiter supraclavicular sternocleido\w+
        cervical(?!_(?:cana|canc|carc|vagin|os\b|intraep|spin|vertebr|cord|disc|syrin|myel|kypho|lordo))""",
    "upper limb": r"""upper_(?:limb|extremit)\w* arm(?<!c-arm)s? forearms? elbows? wrists? fingers? thumbs? shoulders?
        clavic(?<!supraclavic)\w+ axill\w+ hand(?<!other_hand)(?<!right-hand)(?<!left-hand)s?(?![_-]side)
        humer(?:us|al|i)(?:_(?:head|neck)s?)? (?:surgical|anatomical)_neck (?:distal|proximal)_radi(?:us|al) ulnar?
        radial_(?:head|neck|art\w+|nerve|styloid|fract\w+) radius_and_ulna radio-?(?:ulnar|carp|capit)\w* olecranon
        carp(?:al|us|i) (?:hypo)?thenar bankart ac_joint metacarp\w+(?:_(?:head|neck)s?)? scapho\w+ lunate pisiform
        capit(?:ate|ell\w+) hamate triquetr\w+ phalan\w+(?!_of_(?:the_)?\w+_toe) [dp]ip mcp scapula\w*
        glen(?:oid|ohumeral) acromi\w* coraco\w+ rotator_cuff (?:supra|infra)spinatus scapularis brachial deltoid
        biceps bicipital triceps""",
    "lower limb": r"""lower_(?:limb|extremit)\w* legs? thighs? knees? femurs? femora
        (?:patello|popliteo|coxo|ilio)?-?femor(?:al|o)\w*(?:_(?:head|neck)s?(?:_and_neck)?)? tibi(?:a|al|as|o\w+)
        fibul\w+ patell\w+ ankles? (?:fore|hind|mid)?-?foot feet toes? hallux calcan\w+ tal(?:us|ar|onavicular)
        navicular metatars\w+(?:_(?:head|neck)s?)? tarsal cuboid malleol\w+ menisc\w+ cruciate acl (?:per)?trochant\w+
        perone(?:al|us) achilles popliteal heels? plantar calf calves gastrocnem\w+ soleus vastus genicular adductor\w*
        quadriceps saphen\w+(?!_(?:vein|venous)_graft)""",
}
# Where "left" and "right" are not a side of the patient: layout of the figure, arrows, projections, shunts, "leave"
_LAYOUT = r"arrow\w*|panels?|maps?|images?|pictures?|figures?|photo\w*|columns?|curves?|rows?|corner|inset|frame|star"
_BETWEEN = (
    r"upper|lower|superior|inferior|top|bottom|most|side|small|big|large|thick|thin|short|long|white|black|red|blue"
    r"|green|yellow|orange|open|solid|curved|dotted|dashed|hand|hand_side|and_right|and_left"
)
_NO_SIDE_AFTER = (
    rf"(?![_-](?:(?:{_BETWEEN})[_-])*(?:{_LAYOUT})\b"
    rf"|(?:[_-]?(?:hand_)?(?:side|part|half|edge|border))?_(?:of|in)_(?:the_|each_|this_)?(?:{_LAYOUT}|screen)\b"
    r"|[_-](?:anterior|posterior)_oblique|[_-]lateral_(?:decubitus|recumb|view|radio|x|chest|proj)"
    r"|[_-](?:after|before|now|away|angle\w*|handed|untreated|alone|behind|unrepaired|open\b|in_(?:place|situ)|over\b)"
    r"|[_-]to[_-](?:right|left)\b|\s*[:=])"
)
_NO_SIDE_BEFORE = ("top_", "bottom_", "was_", "were_", "been_", "image_on_the_", "left_to_", "right_to_", "t-to-")
_PAIRED = (
    r"lungs?|kidneys?|sides?|hips?|knees?|breasts?|lobes?|femurs?|femora|femoral|legs?|feet|hands?|eyes?|orbits?|hila"
    r"|ovar(?:y|ies)|adrenals?|hemispher\w+|shoulders?|ureters?|thalam\w+|hemithora\w+|ankles?|maxill\w+|test\w+|tubes"
    r"|arter(?:y|ies)|ventricles|atria|wrists?|elbows?|arms?|veins|ears?|thighs?|joints?|sinuses|ethmoid\w*"
)
LATERALITY = {
    side: f"{side}{''.join(f'(?<!{word}{side})' for word in _NO_SIDE_BEFORE)}(?:-?wards?)?{_NO_SIDE_AFTER}"
    rf" {side[0]}t(?<!at_rt)(?<!after_rt)(?=[_.-]) {side[0]}(?=_(?:{_PAIRED}))"
    for side in ("left", "right")
} | {"bilateral": rf"bilat\w* b/l both(?:_the)?(?:_\w+){{0,2}}?_(?:{_PAIRED})"}

# Common words that begin none of the above, passed over for speed
_COMMON = r"(?!(?:the|of|and|an?|in|with|show\w*|arrows?|to|is|at|on|mass|was|after|patient|from|by|scan)[^a-z0-9])"


def _compile(words: dict[str, str], prefix: str = "") -> tuple[re.Pattern, tuple[str, ...]]:
    """Return one pattern with a group per value, in the order of the values."""
    groups = "|".join(f"({'|'.join(text.split()).replace('_', ' ')})" for text in words.values())
    return re.compile(rf"(?<![a-z0-9]){_COMMON}{prefix}(?:{groups})(?![a-z0-9])"), tuple(words)


_READERS = {"modality": _compile(MODALITY), "region": _compile(REGION, _PREFIX), "laterality": _compile(LATERALITY)}
_READERS["implied modality"] = _compile(IMPLIED_MODALITY)

# --- Negation: triggers, pseudo-triggers and terminations that captions use of NegEx (Chapman et al., J Biomed Inform
# 34:301, 2001) and ConText (Harkema et al., J Biomed Inform 42:839, 2009), as in negspacy 1.1 -----------------------

_BEFORE = re.compile(
    r"\b(?:(?<![-.])(?:no|without)(?! (?:longer(?! any)|more|only|\w+ing the)\b)(?![-.:])|(?:absence|lack|devoid) of"
    r"|free of|absent|lack(?:s|ing)|(?<!of )missing|negative for|neither|rul(?:ed|es|ing) out|non-?visuali[sz]ation of"
    r"|(?<!not )exclud\w+(?= an?y?\b)|not (?:showing|revealing|demonstrating|causing|associated with)"
    r"|(?:not|fail\w* to|cannot) (?:show|reveal|demonstrate|identify|detect|visuali[sz]e|find|contain|cause))(?: |$)"
)
_AFTER = re.compile(
    r"\b(?:(?:not|no longer|never|cannot)(?: be| been| (?!clear|ful|comple|entire|direct)\w+ly){0,2} (?:seen|visible"
    r"|visuali[sz]ed|identifi(?:ed|able)|detect(?:ed|able)|observed|noted|present|found|demonstrated|evident|apparent"
    r"|depicted|revealed|apprecia(?:ted|ble)|recogni[sz](?:ed|able)|perceived|discern[ai]ble|showed)"
    r"|(?:is|are|was|were) (?:absent|missing|lacking|excluded(?! from)|ruled out))\b"
)
_SIGNS = re.compile(r"\b(?:evidence|findings?|signs?|features?|indications?|visuali[sz]ation|traces?) (?:of|for) ")
_SCOPE = 6  # words after a trigger that it can negate, as in NegEx
# Words that end the noun phrase that names a finding
_STOP = re.compile(
    r"in|on|of|at|with|within|from|to|for|by|after|before|during|between|along|around|into|through|near|over|under|or"
    r"|and|nor|but|however|although|though|except|despite|while|whereas|which|that|this|these|those|who|where|when|as"
    r"|than|is|are|was|were|be|been|being|has|have|had|can|could|may|due|because|since|if|then|also|only|it|its|there"
    r"|not|do|does|did|beyond|below|above|across|against|still|yet|nevertheless|up|down|out|show\w*|reveal\w*"
    r"|suggest\w*|confirm\w*|demonstrate[sd]?|demonstrating|display(?:s|ing)?|presents|results"
)
# They too, but only behind a noun: "no associated effusion", "no effusion associated with"
_STOP_AFTER_NOUN = re.compile(
    r"\w{3,}ed|seen|visible|present|found|secondary|consistent|compatible|prior|suitable|adjacent|demonstrable"
    r"|(?:surround|involv|caus|follow|extend|aris|occurr|requir|continu|indicat|compress|invad)ing"
)
_JOINERS = frozenset((",", "and", "or", "nor"))
_DETERMINERS = frozenset(("a", "an", "the", "any", "other", "further", "obvious", "apparent", "such"))
# Not heads where they end the phrase: "no flow distal to", "no pulmonary or recurrent disease"
_ADJECTIVES = re.compile(
    r"(?!signal|canal|interval|removal|metal|material|ovary|molar|calcar)\w{2,}(?:al|[ln]ar|ic|ous|ive|ary)"
    r"|(?!\w*(?:maly|galy))\w+ly|[\w-]{3,}ed|anterior|posterior|superior|inferior|elsewhere|outside|longer|new"
    r"|recurrent|acute|left|right|clear|definite|significant|iv|free|else|well|more|bony|apparent|evident|secondary"
)
# "Without contrast" says how an image was made, not what is absent from it
_NO_FINDING = re.compile(
    r"contrast|dye|gadolinium|injection|agents?|medium|material|administration|use|need|history|complications?|time"
    r"|case|patients?|symptoms?|complaints?|pain|changes?|variations?|difference|way|one|doubt|success|assumptions?"
    r"|surgery|treatment|therapy|evidence|signs?|risks?|tests?|(?:in|de)crease|improvement|progression"
)
_WORD = re.compile(r"[a-z](?:[a-z0-9'-]*[a-z0-9])?|\d+|[,.;:()]")
_CLAUSE_START = re.compile(r"[,.;:()]|\b(?:and|but|(?:al)?though|while|which|that|where|with|showing|shows?)\b")
_PLURALS = {"ies": "y", "eses": "esis", "ases": "asis", "oses": "osis", "sses": "ss", "teeth": "tooth", "i": "us"}


def _singular(word: str) -> str:
    for ending, singular in _PLURALS.items():
        if word.endswith(ending) and (len(word) > len(ending) + 2 or word == "teeth"):
            return word[: -len(ending)] + singular
    return word[:-1] if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")) else word


def _noun(phrase: Sequence[str]) -> str:
    nouns = (word for word in reversed(phrase) if word not in _DETERMINERS and not _ADJECTIVES.fullmatch(word))
    return next(nouns, "")


def _head(phrase: Sequence[str]) -> str | None:
    """Return the last noun, singular, of a noun phrase; None if it does not name a finding."""
    noun = _noun(phrase)
    return None if len(noun) < 2 or _NO_FINDING.fullmatch(noun) else _singular(noun)


def _noun_phrase(words: Sequence[str]) -> list[str]:
    """Return the words up to the first that ends a noun phrase, at most `_SCOPE`."""
    phrase = []
    for word in words[:_SCOPE]:
        if not word[0].isalpha() or _STOP.fullmatch(word) or (_STOP_AFTER_NOUN.fullmatch(word) and _noun(phrase)):
            break
        phrase.append(word)
    return phrase


def _negated_after(text: str) -> list[str | None]:
    """Return the heads of the findings that the beginning of `text` lists: "fracture, dislocation or effusion in"."""
    words = [*_WORD.findall(_SIGNS.sub("", text[:200]).replace("/", " or ")), "."]
    heads, pending, joiner = [], [], "or"
    while phrase := _noun_phrase(words):
        # After a comma the list goes on only if an "or" follows
        pending.append(_head(phrase))
        if joiner != ",":
            heads, pending = heads + pending, []
        joiner, *words = words[len(phrase) :]
        if joiner == "," and words[0] in _JOINERS:  # "no fracture, dislocation, and effusion"
            joiner, *words = words
            heads, pending = heads + pending, []
        if joiner == "," and not _noun(phrase):  # between adjectives
            joiner = "or"
        if joiner not in _JOINERS or words[0] in ("normal", "no") or (joiner == "and" and pending):
            break
        if joiner in (",", "and") and words[0] in ("a", "an", "the"):  # begins something else
            break
    return heads


def _negations(text: str) -> set[str]:
    text = text.replace("n't ", " not ")
    heads = {head for match in _BEFORE.finditer(text) for head in _negated_after(text[match.end() :])}
    for match in _AFTER.finditer(text):  # of a clause: "the fistulous tract to the anorectum" [is not seen]
        clause = _CLAUSE_START.split(text[: match.start()][-100:])[-1]
        words = itertools.dropwhile(_STOP.fullmatch, _WORD.findall(_SIGNS.sub("", clause)))
        heads.add(_head(_noun_phrase(list(words))))
    return heads - {None}


# --- Measurement: lengths in millimeters ---------------------------------------------------------------------------

# "3. 5" is how BLIP's tokenizer decodes "3.5"
_NUMBER = r"\d{1,3} ?[.,] ?\d{1,2}|\d{1,4}"
_LENGTH = re.compile(
    rf"(?:(?<![\w.,])|(?<=mx)|(?<=m x))((?:{_NUMBER})(?: ?(?:x|\*|by|-|/|to|and|or) ?(?:{_NUMBER})){{0,2}})"
    r"[ -]{0,2}(mms?|cms?|millimet\w+|centimet\w+)( ?\^?3\b)?(?!(?!x ?\d)[\w/^]| ?hg\b| h2o| ?2\b)"
)
# Words before and after lengths of the scan or of the printed figure, which are not lengths in the patient
_TECHNIQUE = re.compile(
    r"\b(?:(?:(?:slice|section|slab|reconstruction)s?(?:(?: with an?)?[ -]thick\w*| interval)?|intervals)"
    r"(?: of| at| is| was)?[ =:,(]*|(?:field of view|fov|collimation|scale|bar|spacing|pixel|voxel|matrix"
    r"|resolutions?(?! of (?:an?|the)\b))\b[^.;]*)$"
)
_TECHNIQUE_AFTER = re.compile(
    r"[ -](?:\w+[ -])?(?:slices?|sections?|images?|mip|fov|field of view|collimation|tomograms?)\b| \(\d+ ?x ?\d+ dpi"
)
TOLERANCE = 0.1  # of the larger length: about what rounding to half a centimeter or moving the calipers changes


def _measurements(text: str) -> set[str]:
    lengths = set()
    for match in _LENGTH.finditer(text):
        before = text[max(0, match.start() - 35) : match.start()]
        volume = match[3] and not re.search(r"x|\*|by", match[1])  # "2 x 3 cm3" has lengths
        if volume or _TECHNIQUE.search(before) or _TECHNIQUE_AFTER.match(text, match.end()):
            continue
        scale = 10 if match[2].startswith("c") else 1
        for number in re.findall(_NUMBER, match[1]):
            millimeters = scale * float(number.replace(" ", "").replace(",", "."))
            lengths |= {f"{millimeters:g}"} if millimeters > 0 else set()
    return lengths


# --- Reading a caption ---------------------------------------------------------------------------------------------

# Published captions lack the space after a title: "scanThe mass"
_GLUED = re.compile(r"(?<=[a-z]{2})(?=[A-Z][a-z]{2})")
_DASH = re.compile(r" - (?=(?:an?|the|this|there|which|with|without|no)\b(?! -))")


@functools.lru_cache(maxsize=2**17)  # the captions of a training split: each is read by two or three readers
def plain_text(caption: str) -> str:
    """Return `caption` as the tables are written: lower case, no accents, one kind of dash."""
    caption = _GLUED.sub(" ", caption.replace(" mM", " mmol"))
    if not caption.isascii():
        caption = unicodedata.normalize("NFKD", caption)
        caption = "".join(c for c in caption if not unicodedata.combining(c))
        caption = re.sub(r"\s*[–—]\s+", ", ", caption)  # a dash between clauses, not within a word
        caption = caption.translate({ord(c): "-" for c in "–—−‐‑‒"} | {ord("×"): "x", ord("’"): "'"})
    # "x - ray", as BLIP decodes it, becomes "x-ray"; the dash in "clear - the heart is large" is one between clauses
    caption = _DASH.sub(", ", " ".join(caption.lower().split()))
    return caption.replace(" -", "-").replace("- ", "-").replace(" /", "/").replace("/ ", "/")


def _mentions(attribute: str, text: str) -> list[str]:
    pattern, values = _READERS[attribute]
    found = [values[match.lastindex - 1] for match in pattern.finditer(text)]
    return found if found or attribute != "modality" else _mentions("implied modality", text)[:1]


# Cached because baselines repeat captions, and each system is compared with the same references
@functools.lru_cache(maxsize=2**15)
def stated_attributes(caption: str) -> dict[str, frozenset[str]]:
    """Return what `caption` states of each of `ATTRIBUTES`; an empty set where it states nothing.

    `modality`, `region` and `laterality` have keys of the tables `MODALITY`, `REGION` and `LATERALITY`; `negation` has
    the nouns of the findings that are said to be absent, lower case and singular; `measurement` has lengths in
    millimeters, as text: "35", "12.5".
    """
    text = plain_text(caption)
    found = {name: frozenset(_mentions(name, text)) for name in ATTRIBUTES[:3]}
    return found | {"negation": frozenset(_negations(text)), "measurement": frozenset(_measurements(text))}


# --- Agreement -----------------------------------------------------------------------------------------------------


def micro_f1(sums: np.ndarray, number: int) -> np.ndarray:
    """Return the F1 `[...]` of `[..., 3]` common, predicted and stated items; NaN where there are none of either."""
    items = np.asarray(sums[..., 1] + sums[..., 2], float)
    return np.divide(2 * sums[..., 0], items, out=np.full(items.shape, np.nan), where=items > 0)


def _same_lengths(predicted: Set[str], stated: Set[str]) -> int:
    """Return how many lengths can be paired, one to one, that differ by at most `TOLERANCE`.

    In ascending order each is paired with the smallest near enough, since what is too small for it is so for the next.
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
    """Return the micro F1 of the (caption, value) items of each attribute, see `item_agreement`."""
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
    """Return the first of `MODALITY_CUIS` among an image's `cuis`, else the first that its `caption` names.

    It is a key of `MODALITY`, or `UNKNOWN`, which is no class.
    """
    known = [modality for cui, modality in MODALITY_CUIS.items() if cui in set(cuis)]
    return next(iter(known or _mentions("modality", plain_text(caption))), UNKNOWN)
