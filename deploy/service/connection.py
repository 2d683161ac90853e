"""A connection that asks for nothing has an end, too."""

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closes itself where no complete head of a request comes within `seconds`. uvicorn would wait for ever, and counts such
    connections in its limit: enough of them, and nobody else would be answered."""

    def __init__(self, *arguments, seconds, **options):
        super().__init__(*arguments, **options)
        self._seconds, self._timer = seconds, None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch()

    def data_received(self, data):
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc):
        self._stop()
        super().connection_lost(exc)

    def _watch(self):
        if self.cycle and not self.cycle.response_complete:  # a request, of whose time the guard takes care
            self._stop()
        elif not self._timer:  # runs on whatever comes: a byte now and then does not count
            self._timer = self.loop.call_later(self._seconds, self.timeout_keep_alive_handler)

    def _stop(self):
        if self._timer:
            self._timer.cancel()
            self._timer = None
