"""The certificate of an emitted module: what it measures beside what was predicted and promised."""

from kgraph.certificate.measure import certify
from kgraph.certificate.report import Certificate, CertificateRow, Figure

__all__ = ["Certificate", "CertificateRow", "Figure", "certify"]
