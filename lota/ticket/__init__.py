"""Masks and tickets: validated types, their codecs, files and fingerprints."""

from lota.ticket.fingerprint import add, fingerprint, fingerprint_at, to_hex
from lota.ticket.manifest import BaseTensor, Manifest, TensorRecord
from lota.ticket.mask import Mask
from lota.ticket.reader import read_manifest
from lota.ticket.ticket import Ticket
from lota.ticket.writer import TicketWriter

__all__ = [
    "BaseTensor",
    "Manifest",
    "Mask",
    "TensorRecord",
    "Ticket",
    "TicketWriter",
    "add",
    "fingerprint",
    "fingerprint_at",
    "read_manifest",
    "to_hex",
]
