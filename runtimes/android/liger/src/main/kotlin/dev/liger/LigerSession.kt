package dev.liger

import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.channels.trySendBlocking
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.channelFlow
import kotlinx.coroutines.flow.flowOn
import java.io.Closeable
import java.io.File

/** What a bundle, a state or a call got wrong: one line that says what, where, and what to do. */
class LigerException(message: String) : RuntimeException(message)

/** Temperature 0 is greedy; topK 0 and topP 1 keep everything. */
data class Generation(
    val maxNewTokens: Long = 256,
    val temperature: Double = 0.0,
    val topK: Long = 0,
    val topP: Double = 1.0,
    val seed: Long = 0,
)

/** One new token, and the characters that it completes (none, or several). */
data class Token(val id: Long, val text: String)

/**
 * A conversation over a bundle that `liger-deploy export` wrote. Its memory does not grow with its length.
 *
 * One call at a time; close it when done.
 *
 * @param bundle the bundle's directory.
 * @param runtime ONNX Runtime's library, where the bundle is for it: on Android the name in the APK is enough.
 */
class LigerSession(bundle: File, runtime: String = "libonnxruntime.so", threads: Int = 0) : Closeable {
    private var handle = Native.open(bundle.path.encodeToByteArray(), runtime.encodeToByteArray(), threads)
    private var begun = false

    /** The tokens that follow a text. Cancel the flow's collection to stop early. */
    fun complete(prompt: String, options: Generation = Generation()): Flow<Token> =
        tokens(prompt, 0, options)

    /** The model's answer to a message, in its chat template; the conversation goes on with the next call. */
    fun chat(message: String, options: Generation = Generation()): Flow<Token> =
        tokens(message, CHAT, options)

    /** The conversation so far as a file that any runtime, on any machine, continues. */
    fun save(file: File) = Native.save(open(), file.path.encodeToByteArray())

    /** Continue a saved conversation of the same model. */
    fun load(file: File) {
        Native.load(open(), file.path.encodeToByteArray())
        begun = true
    }

    /** Forget everything. */
    fun reset() {
        Native.reset(open())
        begun = false
    }

    override fun close() {
        if (handle != 0L) Native.close(handle)
        handle = 0
    }

    private fun open(): Long = if (handle != 0L) handle else throw LigerException("this session is closed")

    private fun tokens(text: String, flags: Int, options: Generation): Flow<Token> = channelFlow {
        val session = open()
        val prompt = Native.encode(session, text.encodeToByteArray(), if (begun) flags or CONTINUES else flags)
        val callback = OnToken { id, piece -> trySendBlocking(Token(id, piece.decodeToString())).isSuccess }
        begun = true
        with(options) { Native.generate(session, prompt, maxNewTokens, temperature, topK, topP, seed, callback) }
    }.flowOn(Dispatchers.Default)

    private companion object {
        const val CONTINUES = 1
        const val CHAT = 2
    }
}

internal fun interface OnToken {
    fun onToken(id: Long, text: ByteArray): Boolean
}

internal object Native {
    init {
        System.loadLibrary("liger_jni")
    }

    external fun open(bundle: ByteArray, runtime: ByteArray, threads: Int): Long

    external fun close(handle: Long)

    external fun reset(handle: Long)

    external fun save(handle: Long, path: ByteArray)

    external fun load(handle: Long, path: ByteArray)

    external fun encode(handle: Long, prompt: ByteArray, flags: Int): LongArray

    external fun generate(
        handle: Long,
        prompt: LongArray,
        most: Long,
        temperature: Double,
        topK: Long,
        topP: Double,
        seed: Long,
        callback: OnToken,
    )
}
