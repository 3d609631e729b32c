"""The check of a server (--check_server): compares the answers of the server with those of the run's model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError
from utils.base.files import write_json
from utils.base.logger import logger
from utils.cli.arguments import InferArguments
from utils.data.encode_plan import encode_rows
from utils.data.encoding_report import EncodingReport
from utils.data.plan import draw
from utils.data.tally import Tally
from utils.formats.conversation import Row
from utils.serve.client import Refused, Reply, Server
from utils.serve.compare import ROUNDING, Asked, Checked, Expected, agree, check_row
from utils.serve.expected import Model
from utils.serve.findings import Finding, findings, template_differs
from utils.serve.request import NotSayable, Question, question_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from utils.encode.encoder import Encoder

# At most this number of rows are asked again, without the template of the server, to find out why answers differ.
_ASKED_AGAIN = 3
_PROGRESS_ROWS = 16


class ServerCheck:
    """Compares the answers of a server with those of a model on this machine, for the same rows."""

    def __init__(
        self,
        server: Server,
        model: Any,
        encoder: Encoder,
        config: GenerationConfig,
        *,
        args: InferArguments,
        has_adapter: bool,
    ) -> None:
        """Keep the server, the model and the arguments.

        With `has_adapter`, the answers of the server are also compared with those of the model without its adapter.
        """
        self.server = server
        self.encoder = encoder
        self.args = args
        self.rounding = ROUNDING[str(model.dtype).removeprefix('torch.')]
        self.own = Model(model, encoder.tokenizer, config, encoder.images)
        self.base = None
        if has_adapter:
            self.base = Model(model, encoder.tokenizer, config, encoder.images, is_base=True)
        self.not_sent = Tally()
        self.refused = Tally()

    def run(self, rows: Sequence[Row], target: Path) -> int:
        """Send the rows to the server, print the findings, and write them to the file `target`.

        If --show_dataset_sample is smaller than the number of rows, only that many rows are drawn and sent. Returns 1
        if a finding is a failure, for example because the server answers differently or refused a row. Otherwise
        returns 0. Raises ConfigError if no row can be compared, or if the server does not answer.
        """
        chosen = draw(list(rows), self.args.show_dataset_sample, self.args.dataset_seed)
        asked = self._ask(self._questions(chosen))
        checked = self._compare(asked)

        found = findings(checked, self.own, has_base=self.base is not None, rounding=self.rounding)
        if found[0].agrees is not False:
            found[0] = self._ask_again(checked) or found[0]
        found += [Finding('requests', False, line) for line in self.refused.lines('refused by the server')]
        found += [Finding('rows', None, line) for line in self.not_sent.lines('not sent')]

        failed = sum(finding.agrees is False for finding in found)
        for finding in found:
            print(finding.line())
        verdict = f'{failed} checks failed' if failed else 'the server answers as the run'
        print(f'{verdict}: {len(checked)} of {len(rows)} rows compared')
        write_json(target, self._record(checked, found))
        logger.info(f'written to {target}')
        return int(failed > 0)

    def _questions(self, rows: Sequence[Row]) -> list[Question]:
        """Return the requests for the rows. `self.not_sent` then counts the rows that cannot be sent.

        Raises ConfigError if no row can be sent.
        """
        report = EncodingReport()
        _, kept = encode_rows(self.encoder, rows, report)
        self.not_sent.merge(report.left_out)
        questions = []
        for row in kept:
            try:
                questions.append(question_of(row, self.encoder))
            except NotSayable as reason:
                self.not_sent.add(str(reason), row.origin)
        if not questions:
            raise ConfigError(
                f'--check_server: no row can be sent: {"; ".join(self.not_sent.lines("not sent"))}. '
                'Give other conversations with --dataset.'
            )
        return questions

    def _ask(self, questions: Sequence[Question]) -> list[Asked]:
        """Send the requests, and return the replies, in the order of `questions`.

        A refused request has no reply. `self.refused` counts these requests. Raises ConfigError if the server refuses
        all requests, or if it does not answer.
        """
        asked = []
        for number, question in enumerate(questions, 1):
            try:
                reply = self.server.ask(question.request, max_tokens=self.args.max_new_tokens)
            except Refused as error:
                self.refused.add(str(error), question.row.origin)
                continue
            served_ids = self.server.prompt_ids(question.request)
            asked.append(Asked(question=question, reply=reply, served_ids=served_ids))
            if number % _PROGRESS_ROWS == 0:
                logger.info(f'{number} of {len(questions)} rows were sent to the server')
        if not asked:
            raise ConfigError(
                f'--check_server {self.args.check_server}: the server answers no row: '
                f'{"; ".join(self.refused.lines("refused"))}. Read the log of the server, and check that '
                '--served_model has the name of a model that the server lists.'
            )
        return asked

    def _compare(self, asked: Sequence[Asked]) -> list[Checked]:
        questions = [one.question for one in asked]
        own = self._expected(self.own, questions)
        base: Sequence[Expected | None] = [None] * len(questions)
        if self.base is not None:
            base = self._expected(self.base, questions)
        return [
            check_row(one, here, other, rounding=self.rounding)
            for one, here, other in zip(asked, own, base, strict=True)
        ]

    def _expected(self, model: Model, questions: Sequence[Question]) -> list[Expected]:
        answers = model.answers(questions, batch_size=self.args.infer_batch_size)
        return [Expected(model=model, ids=ids, limit=self.args.max_new_tokens) for ids in answers]

    def _ask_again(self, checked: Sequence[Checked]) -> Finding | None:
        """Test whether the server has a different chat template. Returns the finding that says so, or None.

        Only rows with different answers and without images or separate reasoning are tested. The prompt of the run is
        sent as a raw prompt, to which the server applies no template. If all new answers agree with those of the run,
        the template of the server has caused the difference.
        """
        # The test needs no rows whose prompt ids the server gives: for these rows, the ids are compared.
        differing = [
            row
            for row in checked
            if row.agreement is not None
            and not (row.agreement.holds or row.reply.reasoning or row.asked.question.paths)
            and row.served_ids is None
        ]
        tried = agreeing = 0
        for row in differing[:_ASKED_AGAIN]:
            reply = self._without_template(row.asked.question)
            if reply is None:
                continue
            again = agree(row.asked.question, reply, row.answer, rounding=self.rounding)
            tried += 1
            agreeing += again is not None and again.holds
        return template_differs(agreeing, tried) if tried and agreeing == tried else None

    def _without_template(self, question: Question) -> Reply | None:
        """Send the prompt of the run as a raw prompt, to which the server applies no template. Returns the reply.

        The prompt is sent as token ids. If the server refuses ids, the prompt is sent as the text that `_as_text`
        returns. Returns None if the server refuses both, or if there is no such text.
        """
        for prompt in (question.ids, self._as_text(question.ids)):
            if prompt is None:
                continue
            try:
                return self.server.complete(prompt, max_tokens=self.args.max_new_tokens)
            except Refused:
                continue
        return None

    def _as_text(self, ids: list[int]) -> str | None:
        """Return a text that the tokenizer turns into exactly these ids.

        The decoded ids are tried, with and without the begin-of-sequence token. Returns None if neither text gives
        these ids.
        """
        tokenizer = self.encoder.tokenizer
        text = tokenizer.decode(ids)
        texts = (text, text.removeprefix(tokenizer.bos_token or ''))
        return next((one for one in texts if tokenizer(one)['input_ids'] == ids), None)

    def _record(self, checked: Sequence[Checked], found: Sequence[Finding]) -> dict[str, Any]:
        return {
            'server': self.server.address,
            'model': self.server.model,
            'passed': not any(finding.agrees is False for finding in found),
            'findings': [finding._asdict() for finding in found],
            'not_sent': self.not_sent.counts,
            'refused': self.refused.counts,
            'rows': [row.to_json() for row in checked],
        }
