"""A process as bytes, and who owns it: the checkpoint codec, the `Persister` seam, and the stores behind it."""

from prunus.persistence.checkpoint import (
    Checkpoint,
    checkpoint_as_yaml,
    decode_checkpoint,
    decode_data,
    encode_checkpoint,
    encode_data,
    type_loader,
)
from prunus.persistence.persister import (
    Claim,
    Effects,
    Event,
    Letter,
    NewProcess,
    Persister,
    Posted,
    Query,
    Record,
    Save,
    Saved,
)
from prunus.persistence.requests import RequestPersister
from prunus.persistence.sqlite import MemoryPersister, ProcessStore, SqlitePersister, open_database

__all__ = [
    "Checkpoint",
    "Claim",
    "Effects",
    "Event",
    "Letter",
    "MemoryPersister",
    "NewProcess",
    "Persister",
    "Posted",
    "ProcessStore",
    "Query",
    "Record",
    "RequestPersister",
    "Save",
    "Saved",
    "SqlitePersister",
    "checkpoint_as_yaml",
    "decode_checkpoint",
    "decode_data",
    "encode_checkpoint",
    "encode_data",
    "open_database",
    "type_loader",
]
