import CLiger
import Foundation

/// What a bundle, a state or a call got wrong: one line that says what, where, and what to do.
public struct LigerError: Error, CustomStringConvertible {
    public let code: Int
    public let description: String
}

/// Temperature 0 is greedy; topK 0 and topP 1 keep everything.
public struct Generation: Sendable {
    public var maxNewTokens: Int64 = 256
    public var temperature = 0.0
    public var topK: Int64 = 0
    public var topP = 1.0
    public var seed: UInt64 = 0
    public init() {}
}

/// One new token, and the characters that it completes (none, or several).
public struct Token: Sendable {
    public let id: Int64
    public let text: String
}

/// A conversation over a bundle that `liger-deploy export` wrote. Its memory does not grow with its length.
/// An actor: one call at a time.
public actor LigerSession {
    private var bundle: OpaquePointer?
    private var text: OpaquePointer?
    private var session: OpaquePointer?
    private var begun = false

    public init(bundle url: URL, threads: Int32 = 0) throws {
        try check(liger_bundle_open(url.path, 1, &bundle))
        try check(liger_text_open(bundle, &text))
        var options = liger_options()
        options.size = MemoryLayout<liger_options>.size
        options.threads = threads
        try check(liger_session_open(bundle, &options, &session))
    }

    deinit {
        liger_session_close(session)
        liger_text_close(text)
        liger_bundle_close(bundle)
    }

    /// The tokens that follow a text. Cancel the task that reads them to stop early.
    public nonisolated func complete(_ prompt: String, _ options: Generation = .init()) -> AsyncThrowingStream<Token, Error> {
        stream { try await self.generate(prompt, chat: false, options, $0) }
    }

    /// The model's answer to a message, in its chat template; the conversation goes on with the next call.
    public nonisolated func chat(_ message: String, _ options: Generation = .init()) -> AsyncThrowingStream<Token, Error> {
        stream { try await self.generate(message, chat: true, options, $0) }
    }

    /// The conversation so far as a file that any runtime, on any machine, continues.
    public func save(_ url: URL) throws { try check(liger_session_save(session, url.path)) }

    /// Continue a saved conversation of the same model.
    public func load(_ url: URL) throws {
        try check(liger_session_load(session, url.path))
        begun = true
    }

    /// Forget everything.
    public func reset() {
        liger_session_reset(session)
        begun = false
    }

    private typealias Continuation = AsyncThrowingStream<Token, Error>.Continuation

    private nonisolated func stream(_ work: @escaping @Sendable (Continuation) async throws -> Void)
        -> AsyncThrowingStream<Token, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await work(continuation)
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func generate(_ prompt: String, chat: Bool, _ options: Generation, _ continuation: Continuation) throws {
        let flags = (begun ? LIGER_CONTINUES : 0) | (chat ? LIGER_CHAT : 0)
        var count = 0
        try check(liger_text_encode(text, prompt, flags, nil, 0, &count))
        var ids = [Int64](repeating: 0, count: count)
        try check(liger_text_encode(text, prompt, flags, &ids, count, &count))
        begun = true
        var wanted = liger_generation()
        wanted.size = MemoryLayout<liger_generation>.size
        wanted.max_new_tokens = options.maxNewTokens
        wanted.temperature = options.temperature
        wanted.top_p = options.topP
        wanted.top_k = options.topK
        wanted.seed = options.seed
        let sink = Unmanaged.passRetained(Sink(continuation))
        defer { sink.release() }
        try check(liger_generate(session, text, ids, count, &wanted, { id, bytes, size, user in
            let sink = Unmanaged<Sink>.fromOpaque(user!).takeUnretainedValue()
            let piece = UnsafeRawBufferPointer(start: bytes, count: size)
            sink.continuation.yield(Token(id: id, text: String(decoding: piece, as: UTF8.self)))
            return Task.isCancelled ? 0 : 1
        }, sink.toOpaque(), nil))
    }

    private final class Sink {
        let continuation: Continuation
        init(_ continuation: Continuation) { self.continuation = continuation }
    }
}

private func check(_ status: liger_status) throws {
    if status != LIGER_OK {
        throw LigerError(code: Int(status.rawValue), description: String(cString: liger_last_error()))
    }
}
