"""``prunus top``: the daemon, its queues and its processes on one screen that keeps itself up to date.

==========  ================================================================================================
module      what it is
==========  ================================================================================================
`model`     what is shown: pure functions from facts to lines, for any width
`source`    where the facts come from: one look at the broker, at the services and at one process
`app`       the screen and its keys, with Textual (the only module that imports it)
==========  ================================================================================================
"""
