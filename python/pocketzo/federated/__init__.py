"""A federation: devices train one model together, and send seeds and scalars in the place of weights.

A direction is a function of (seed, tensor, draw, element), so that a client's whole contribution to a step is a number
for each of its draws, and a step of all clients is one entry of a journal. :mod:`pocketzo.federated.server` and
:mod:`pocketzo.federated.client` turn messages into messages; :mod:`pocketzo.federated.protocol` has their bytes. They
know no transport: :mod:`pocketzo.federated.flower` carries messages by Flower, :mod:`pocketzo.federated.mailbox` by
folders.
"""
