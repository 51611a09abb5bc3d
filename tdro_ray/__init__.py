"""tdro-ray: learned data mixtures (tDRO, AAAI 2025) for LLM-based dense retrieval, on Ray."""

__version__ = "0.1.0"
