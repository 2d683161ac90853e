from ppdensecl.losses.info_nce import info_nce, info_nce_plain

__all__ = ["info_nce", "info_nce_plain"]
