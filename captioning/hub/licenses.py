"""The licenses that the Hub knows; it rejects a card with another one, at the end of a run."""

from captioning.errors import UserError, did_you_mean


# https://huggingface.co/docs/hub/repositories-licenses
LICENSES_OF_THE_HUB = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()  # noqa: SIM905


def check_license(name: str | None) -> None:
    """Raise UserError for a license that the Hub does not know; one of one's own is `other`, described in the card."""
    if name is not None and name not in LICENSES_OF_THE_HUB:
        near = did_you_mean(f"{name.lower()} ", LICENSES_OF_THE_HUB)
        mend = "; set an identifier of https://huggingface.co/docs/hub/repositories-licenses, or 'other'"
        raise UserError(f"license '{name}' is not one that the Hub knows{near}{mend}")
